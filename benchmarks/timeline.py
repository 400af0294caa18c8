"""Draws a timeline that `trainer.record_timeline` wrote: `python -m benchmarks.timeline FILE.json OUT.png`.

Perfetto shows the same and more; this makes the picture in docs/coordinator.md. With `--record` it first
trains a small GPT within a limit of memory and writes FILE.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import trainer
from ps import LocalCluster
from trainer.app.gpt import GPT, GPTConfig

SMALLEST_BYTES = 1 << 18
"""Parameters smaller than this are left out; there are too many to tell apart."""

Event = dict[str, Any]


def record(path: Path) -> None:
    """Writes the timeline of one training step, the fifth."""
    torch.set_num_threads(1)
    x, y = torch.randint(0, 256, (2, 4, 256))
    with LocalCluster(servers=2) as cluster, trainer.connect(cluster.addresses, job="timeline") as job:
        model = GPT(GPTConfig(layers=4, width=512, heads=8, context=256)).to(torch.bfloat16)
        trainer.offload(model, job, trainer.OffloadConfig(max_live_bytes=20 << 20, prefetch_bucket_size=1_500_000))
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW)

        def step() -> None:
            model(x, y).backward()
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(4):
            step()
        with trainer.record_timeline(model, path):
            step()


def draw(events: list[Event], out: Path) -> None:
    """One line for each parameter in the order of first use, over those of memory and of modules."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    spans = [(*span, "request") for span in _spans(events, "request")]
    spans += [(*span, "resident") for span in _spans(events, "resident")]
    names = list(dict.fromkeys(name for name, *_ in sorted(spans, key=lambda span: span[1])))
    row = {name: len(names) - index for index, name in enumerate(names)}
    colours = {"request": "#e0a030", "resident": "#9cc3dd", "waiting": "#c0392b", "used": "#1b4f72"}
    figure, (lanes, memory, waits) = pyplot.subplots(
        3, 1, sharex=True, figsize=(11, 6.4), height_ratios=(len(names), 4, 1.4), layout="constrained"
    )
    for name, begin, end, kind in spans:
        lanes.barh(row[name], end - begin, left=begin, height=0.72, color=colours[kind])
    for event in _of(events, "i"):
        for name in event["args"]["parameters"]:
            if name in row:
                at = event["ts"] / 1e3
                lanes.vlines(at, row[name] - 0.42, row[name] + 0.42, color=colours["used"], linewidth=1.6)
    lanes.set_yticks(list(row.values()), list(row), fontsize=7)
    lanes.set_ylim(0.2, len(names) + 0.8)
    lanes.legend(
        handles=[
            Patch(color=colours["request"], label="requested, on its way"),
            Patch(color=colours["resident"], label="arrived, resident"),
            Line2D([], [], color=colours["used"], linewidth=2, label="used"),
            Patch(color=colours["waiting"], label="a module waits"),
        ],
        fontsize=8,
        ncols=4,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        frameon=False,
    )
    live = [(event["ts"] / 1e3, event["args"]["bytes"] / (1 << 20)) for event in _of(events, "C")]
    memory.step(*zip(*live, strict=True), where="post", color=colours["used"], linewidth=1)
    memory.set_ylabel("live, MiB", fontsize=8)
    memory.set_ylim(0)
    for event in _of(events, "X"):
        if event["cat"] == "waiting":
            waits.barh(0, event["dur"] / 1e3, left=event["ts"] / 1e3, color=colours["waiting"])
    waits.set_yticks([0], ["waiting"], fontsize=8)
    waits.set_xlabel("ms")
    for axes in (lanes, memory, waits):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", linewidth=0.3)
    figure.savefig(out, dpi=100)


def _of(events: list[Event], phase: str) -> list[Event]:
    return [event for event in events if event["ph"] == phase]


def _spans(events: list[Event], category: str) -> list[tuple[str, float, float]]:
    """Parameter, begin and end in milliseconds; what was not over at the end of the file is left out."""
    found, open_since = [], {}
    large = {e["name"] for e in _of(events, "b") if e.get("args", {}).get("bytes", 0) >= SMALLEST_BYTES}
    for event in sorted(_of(events, "b") + _of(events, "e"), key=lambda event: float(event["ts"])):
        if event["cat"] == category and event["name"] in large:
            if event["ph"] == "b":
                open_since[event["name"]] = event["ts"] / 1e3
            elif event["name"] in open_since:
                found.append((event["name"], open_since.pop(event["name"]), event["ts"] / 1e3))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("timeline", type=Path, metavar="FILE.json")
    parser.add_argument("picture", type=Path, metavar="OUT.png")
    parser.add_argument("--record", action="store_true", help="train a small GPT first and write FILE.json")
    arguments = parser.parse_args()
    if arguments.record:
        record(arguments.timeline)
    try:
        events = json.loads(arguments.timeline.read_text())["traceEvents"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"{arguments.timeline} is no timeline of trainer.record_timeline: {error}; --record makes one")
    draw(events, arguments.picture)


if __name__ == "__main__":
    main()
