"""Writes measurements as tables of Markdown.

    python -m benchmarks.tables runs/bench --write README.md docs/performance.md docs/planning.md

A table goes between `<!-- results: NAME -->` and `<!-- end of results -->`, under a line that says when and of which
commit it was measured; NAME is one of those below, and what has no JSON in the folder stays as it is. Without
`--write` all tables go to the screen.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks import report
from benchmarks.scale import SERIES

Rows = Sequence[report.Row]

_PLACE = re.compile(r"(<!-- results: (?P<name>[\w-]+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def step(rows: Rows) -> str:
    """One line a side, a column for each case and number of trainers."""
    found = [row for row in rows if row.name == "step" and row.against == "plain"]
    columns = list(dict.fromkeys((row.case["case"], row.case["trainers"]) for row in found))
    bars = {_key(row): row for row in rows if row.name == "step" and row.at_most is not None}
    by = {_key(row): row for row in found}

    def cell(side: object, case: object, trainers: object) -> str:
        row = by.get((side, case, trainers))
        if row is None:
            return ""
        text = f"{row.value:.2f} s = {row.ratio:.2f}"
        if (bar := bars.get((side, case, trainers))) is not None:
            than = "plain's" if bar.against == "plain" else f"{bar.against}'s"
            text += f" ({bar.ratio:.2f} of {than}, bar {bar.at_most:g}: {'holds' if bar.holds else '**missed**'})"
        return text

    heads = [f"{case}, {trainers} trainer{'s' if trainers != 1 else ''}" for case, trainers in columns]
    sides = dict.fromkeys(row.case["side"] for row in found)
    return _table(["side", *heads], ([str(side), *(cell(side, *column) for column in columns)] for side in sides))


def losses(rows: Rows) -> str:
    """How near each side's losses are to plain torch's."""
    names = ("losses apart", "losses equal bit for bit")
    apart, equal = (
        {(row.case["side"], row.case["case"], row.case["trainers"]): row for row in rows if row.name == name}
        for name in names
    )
    lines = (
        [str(side), str(case), str(trainers), f"{row.value:.2%}", f"{equal[side, case, trainers].ratio:.0%}"]
        for (side, case, trainers), row in apart.items()
    )
    head = [
        "side",
        "case",
        "trainers",
        "losses differ, in the mean, by",
        "losses equal bit for bit",
    ]
    return _table(head, lines)


def memory(rows: Rows) -> str:
    """Peak memory of each side's processes, with one trainer."""
    found = [row for row in rows if row.name == "peak memory" and row.case["trainers"] == 1]
    by: dict[tuple[object, object], list[str]] = {}
    for row in found:
        cell = f"{row.case['process']} {row.value / 1024:.2f}"
        by.setdefault((row.case["side"], row.case["case"]), []).append(cell)
    return _table(
        ["side", "case", "peak memory, GiB"], ([str(s), str(c), ", ".join(each)] for (s, c), each in by.items())
    )


def budget(rows: Rows) -> str:
    """What trainers take beside the activations that plain torch has, too."""
    return _plain([row for row in rows if row.name.startswith("trainer's peak beyond")], [])


def links(rows: Rows) -> str:
    """What each link does, against its building block."""
    return _plain([row for row in rows if row.ratio is not None and "link" in row.case], ["link"])


def scale(rows: Rows) -> str:
    """One line for each run of each series."""
    by: dict[tuple[str, str], dict[str, report.Row]] = {}
    for row in rows:
        if "series" in row.case:
            key = next(str(row.case[name]) for name in SERIES if name in row.case)
            by.setdefault((str(row.case["series"]), key), {})[f"{row.name}, {row.unit}"] = row
    names = list(dict.fromkeys(name for each in by.values() for name in each))
    lines = (
        [series, key, *(f"{each[name].value:.3g}" if name in each else "" for name in names)]
        for (series, key), each in by.items()
    )
    return _table(["series", "", *names], lines)


def plan(rows: Rows) -> str:
    """Planned over measured, a line a configuration."""
    found = [row for row in rows if row.name.startswith("planned ")]
    by: dict[tuple[str, ...], dict[str, report.Row]] = {}
    for row in found:
        key = tuple(str(row.case[name]) for name in ("model", "tier", "batch", "bottleneck"))
        by.setdefault(key, {})[row.name.removeprefix("planned ")] = row
    names = list(dict.fromkeys(name for each in by.values() for name in each))

    def cell(row: report.Row | None) -> str:
        if row is None:
            return ""
        return f"{row.value:.3g} {row.unit.removesuffix(' a step')}" + (
            "" if row.ratio is None else f" ({row.ratio:.2f})"
        )

    lines = ([*key, *(cell(each.get(name)) for name in names)] for key, each in by.items())
    return _table(["model", "state", "batch", "bottleneck", *names], lines)


def bars(rows: Rows) -> str:
    """All rows of a measurement that have a bar."""
    return _plain([row for row in rows if row.bar is not None], [])


TABLES: Mapping[str, tuple[str, Callable[[Rows], str]]] = {
    "step": ("step", step),
    "memory": ("step", memory),
    "budget": ("step", budget),
    "losses": ("step", losses),
    "links": ("links", links),
    "scale": ("scale", scale),
    "plan": ("plan", plan),
    "storage": ("storage", bars),
    "commit": ("commit", bars),
    "optimizer": ("optimizer", bars),
    "coordinator": ("coordinator", bars),
}
"""By name: which measurement's rows, and what makes a table of them."""


PICTURED = ("step", "scale", "links", "plan")


def rendered(folder: Path) -> dict[str, str]:
    """Every table that there are rows for, under the line that says what it is of."""
    found = {}
    for name, (measurement, render) in TABLES.items():
        path = folder / f"{measurement}.json"
        if path.exists() and (text := render((measured := report.read(path)).rows)):
            about = measured.machine
            command = f"python -m benchmarks.{measurement}{' --quick' if about.get('quick') else ''}"
            found[name] = (
                f"`{command}`, {about['date']}, commit {about['commit']}, "
                f"{about['cores']} cores with a load of {about['load']}, torch {about['torch']}.\n\n{text}"
            )
    return found


def with_pictures(tables: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Tables followed by the picture of their rows, if there is one in the folder."""
    found = dict(tables)
    for name in PICTURED:
        if name in found and (folder / f"{name}.png").exists():
            found[name] += f"\n\n![{name}](images/{name}.png)"
    return found


def put(text: str, tables: Mapping[str, str]) -> str:
    """The page with its tables replaced by those that there are. Raises KeyError for a name that is none."""

    def replaced(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise KeyError(f"no table is called {name!r}; there are {', '.join(TABLES)}")
        return f"{match[1]}{tables[name]}\n{match[3]}" if name in tables else match[0]

    return _PLACE.sub(replaced, text)


def _key(row: report.Row) -> tuple[object, object, object]:
    return row.case["side"], row.case["case"], row.case["trainers"]


def _plain(rows: Rows, first: Sequence[str]) -> str:
    def line(row: report.Row) -> list[str]:
        rest = ", ".join(f"{key} {value}" for key, value in row.case.items() if key not in first)
        held = "" if row.holds is None else f"{row.bar}" if row.holds else f"{row.bar}: **missed**"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        what = f"{row.name}{', ' if rest else ''}{rest}"
        value = f"{row.value:.3g} {row.unit}"
        return [*(str(row.case[key]) for key in first), what, value, row.against or "", ratio, held]

    return _table([*first, "what", "", "against", "ratio", "bar"], map(line, rows)) if rows else ""


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *body]) if body else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=report.folder_of_rows, metavar="DIR_OF_JSON")
    parser.add_argument("--write", type=Path, nargs="+", default=[], metavar="PAGE", help="put the tables into pages")
    arguments = parser.parse_args()
    try:
        tables = rendered(arguments.folder)
        pages = {page: put(page.read_text(), with_pictures(tables, page.parent / "images")) for page in arguments.write}
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for page, text in pages.items():
        page.write_text(text)
    if not arguments.write:
        print("\n\n".join(f"{name}: {text}" for name, text in tables.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
