"""Draws what measurements have written: `python -m benchmarks.plots DIR_OF_JSON [--out docs/images]`.

`step.json` becomes `step.png`, and so on; what is not there, or has nothing to draw, is left out.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report

Rows = Sequence[report.Row]

_BLUE, _LIGHT, _ORANGE, _RED, _GREY = "#1b4f72", "#9cc3dd", "#e0a030", "#c0392b", "#8a8a8a"
_MORE = ("#6c7a3b", "#7d4e8c", _GREY, _LIGHT, "#b08968", "#4d4d4d", "#76b7b2", "#d98880", "#a9c47f")
_COLOURS = (_BLUE, "#2e86c1", _ORANGE, _RED, *_MORE)


def draw_all(folder: Path, out: Path) -> list[Path]:
    """The pictures that were drawn."""
    found = []
    for name, draw in DRAWN.items():
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        figure = draw(report.read(path).rows)
        if figure is not None:
            out.mkdir(parents=True, exist_ok=True)
            found.append(out / f"{name}.png")
            figure.savefig(found[-1], dpi=100)
    return found


def step(rows: Rows) -> Any:
    """The step time of every side, of plain torch's, with the bars that there are for it."""
    steps = [row for row in rows if row.name == "step" and row.against == "plain"]
    panels = _grouped(steps, lambda row: (row.case["case"], row.case["trainers"]))
    if not panels:
        return None
    bars = [row for row in rows if row.name == "step" and row.at_most is not None]
    figure, axes = _axes(len(panels), 5.6)
    for at, ((case, trainers), found) in zip(axes, panels.items(), strict=True):
        plain = next((row.value for row in found if row.case["side"] == "plain"), None)
        for number, row in enumerate(found):
            ratio = row.ratio or 0.0
            ours = str(row.case["side"]).startswith("zero-ps")
            at.barh(number, ratio, color=_BLUE if ours else _GREY if row.case["side"] == "plain" else _ORANGE)
            at.text(ratio, number, f" {ratio:.2f}, {row.value:.2f} s", va="center", fontsize=8)
            for bar in (b for b in bars if b.case["side"] == row.case["side"] and _at(b) == (case, trainers)):
                limit = (bar.at_most or 0.0) * bar.value / (bar.ratio or 1.0) / (plain or 1.0)
                at.vlines(limit, number - 0.45, number + 0.45, color=_RED)
        at.set_yticks(range(len(found)), [str(row.case["side"]) for row in found], fontsize=8)
        at.invert_yaxis()
        at.set_xlim(0, 1.3 * max(row.ratio or 0.0 for row in found))
        at.set_title(f"{case}, {trainers} trainer{'s' if trainers != 1 else ''}", fontsize=9)
        at.set_xlabel("step time, of plain torch's; red: the bar", fontsize=8)
    return figure


def links(rows: Rows) -> Any:
    """Pulls and pushes of each link, of what their building block does."""
    compared = [row for row in rows if row.name in ("pull", "push") and row.ratio is not None]
    # Against what has the bar, where there are several.
    found = list({(row.case["link"], row.name): row for row in reversed(compared)}.values())[::-1]
    if not found:
        return None
    figure, (at,) = _axes(1, 7.0)
    for number, row in enumerate(found):
        at.bar(number, row.ratio or 0.0, color=_BLUE if row.name == "pull" else _LIGHT)
        at.text(number, row.ratio or 0.0, f"{row.value:.2g} GB/s", ha="center", va="bottom", fontsize=8)
        if row.at_least is not None:
            at.hlines(row.at_least, number - 0.45, number + 0.45, color=_RED)
    at.set_xticks(range(len(found)), [f"{row.case['link']}\n{row.name}" for row in found], fontsize=8)
    at.set_ylabel("speed, of the building block's; red: the bar", fontsize=8)
    return figure


def staleness(rows: Rows) -> Any:
    """The loss while training with updates as late as they may be."""
    found = [row for row in rows if row.name == "training loss"]
    if not found:
        return None
    last = {row.case["max_staleness"]: row.value for row in rows if row.name == "loss at the end"}
    figure, (at,) = _axes(1, 8.0)
    for (k, each), colour in zip(
        _grouped(found, lambda row: row.case["max_staleness"]).items(), _COLOURS, strict=False
    ):
        label = f"max_staleness={k}: {last[k]:.3f} at the end"
        at.plot([row.case["step"] for row in each], [row.value for row in each], color=colour, marker=".", label=label)
    at.set_xlabel("step", fontsize=8)
    at.set_ylabel("training loss, nats per byte", fontsize=8)
    at.legend(frameon=False, fontsize=8)
    return figure


def scale(rows: Rows) -> Any:
    """Step time over model size, servers and trainers, and the bytes of a step beside it."""
    by_series = _grouped([row for row in rows if "series" in row.case], lambda row: row.case["series"])
    if not by_series:
        return None
    figure, axes = _axes(len(by_series), 4.2)
    for at, (series, found) in zip(axes, by_series.items(), strict=True):
        steps = [row for row in found if row.name == "step" and row.unit == "s"]
        places = range(len(steps))
        at.plot(places, [row.value for row in steps], color=_BLUE, marker="o")
        for place, row in zip(places, steps, strict=True):
            at.annotate(f"{row.value:.2f} s", (place, row.value), (0, 5), textcoords="offset points", fontsize=8)
        names = [", ".join(str(value) for key, value in row.case.items() if key != "series") for row in steps]
        at.set_xticks(places, names, fontsize=8)
        at.set_ylim(0, 1.2 * max(row.value for row in steps))
        at.set_title(f"{series}: s a step", fontsize=9, color=_BLUE)
        other = at.twinx()
        for way, style in (("pulled", "--"), ("pushed", ":")):
            moved = [row.value / 1e3 for row in found if row.name == way]
            other.plot(range(len(moved)), moved, style, color=_ORANGE, label=way)
        other.set_ylim(0)
        other.set_ylabel("GB a step", fontsize=8, color=_ORANGE)
        other.legend(frameon=False, fontsize=7, loc="lower right")
        other.spines["top"].set_visible(False)
        other.tick_params(labelsize=8)
    return figure


def profile(rows: Rows) -> Any:
    """Processor seconds of each process, by what it did."""
    found = [row for row in rows if row.name.startswith("processor: ") and row.name != "processor: all"]
    if not found:
        return None
    kinds = list(dict.fromkeys(row.name for row in sorted(found, key=lambda row: -row.value)))
    colours = {kind: _COLOURS[number % len(_COLOURS)] for number, kind in enumerate(kinds)}
    wall = {_side(row): row.value for row in rows if row.name == "step"}
    bars = _grouped(found, lambda row: (*_side(row), row.case["process"]))
    figure, (at,) = _axes(1, 10.0, 1.0 + 0.32 * len(bars))
    for number, (name, each) in enumerate(bars.items()):
        left = 0.0
        for row in each:
            at.barh(number, row.value, left=left, color=colours[row.name], height=0.7)
            left += row.value
        at.vlines(wall[name[:3]], number - 0.45, number + 0.45, color="black")
    at.set_yticks(range(len(bars)), [f"{c}, {t} trainers, {s}: {p}" for c, t, s, p in bars], fontsize=8)
    at.invert_yaxis()
    at.set_xlabel("processor seconds a step; black: the step on the clock", fontsize=8)
    handles = [at.barh(0, 0, color=colours[kind], label=kind.removeprefix("processor: ")) for kind in kinds]
    at.legend(handles=handles, frameon=False, fontsize=7, ncols=6, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def plan(rows: Rows) -> Any:
    """Step times as planned over those that were measured."""
    found = [row for row in rows if row.name == "planned step" and row.ratio]
    if not found:
        return None
    figure, (at,) = _axes(1, 6.0, 5.0)
    measured = [row.value / (row.ratio or 1.0) for row in found]
    for tier, colour in (("memory", _BLUE), ("disk", _ORANGE)):
        points = [(m, row.value) for m, row in zip(measured, found, strict=True) if row.case["tier"] == tier]
        at.scatter([m for m, _ in points], [p for _, p in points], color=colour, label=f"state in {tier}")
    for m, row in zip(measured, found, strict=True):
        label = f"{row.case['model']}, {row.case['batch']}"
        at.annotate(label, (m, row.value), (4, -3), textcoords="offset points", fontsize=7)
    most = 1.1 * max(*measured, *(row.value for row in found))
    least = 0.8 * min(*measured, *(row.value for row in found))
    at.plot([least, most], [least, most], color=_GREY, linewidth=1)
    at.set_xscale("log")
    at.set_yscale("log")
    at.set_xlabel("step, measured, s", fontsize=8)
    at.set_ylabel("step, planned, s", fontsize=8)
    at.legend(frameon=False, fontsize=8)
    return figure


DRAWN: Mapping[str, Callable[[Rows], Any]] = {
    "step": step,
    "profile": profile,
    "scale": scale,
    "plan": plan,
    "staleness": staleness,
    "links": links,
}
"""By measurement: what draws its rows, None if there is nothing to draw."""


def _at(row: report.Row) -> tuple[object, object]:
    return row.case["case"], row.case["trainers"]


def _side(row: report.Row) -> tuple[object, object, object]:
    return *_at(row), row.case["side"]


def _grouped(rows: Rows, key: Callable[[report.Row], Any]) -> dict[Any, list[report.Row]]:
    found: dict[Any, list[report.Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def _axes(count: int, width: float, height: float = 3.4) -> tuple[Any, Sequence[Any]]:
    """A figure of panels beside each other, two in a row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(2, count)
    lines = -(-count // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(width * columns, height * lines), layout="constrained", squeeze=False
    )
    flat = list(axes.flat)
    for at in flat:
        at.spines[["top", "right"]].set_visible(False)
        at.tick_params(labelsize=8)
    for at in flat[count:]:
        at.remove()
    return figure, flat[:count]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=report.folder_of_rows, metavar="DIR_OF_JSON")
    parser.add_argument("--out", type=report.folder_to_write, metavar="DIR", help="(default: where the JSON is)")
    arguments = parser.parse_args()
    try:
        drawn = draw_all(arguments.folder, arguments.out or arguments.folder)
    except ValueError as error:
        parser.error(str(error))
    for path in drawn:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
