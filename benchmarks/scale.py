"""How step time and bytes grow with the model, with servers and with trainers, as far as one machine can show it.

    python -m benchmarks.scale

A GPT over bytes in bf16 with fp32 AdamW, one sequence of 64 tokens for each trainer, so that it is bytes that take
the time. What grows is compared with the first row of its series. What several series have in common, two servers and
one trainer, is run once.
"""

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from benchmarks import report
from benchmarks.sides.process import Block, Ranks, SideError
from benchmarks.workload import Workload
from ps import LocalCluster

SERIES = ("model", "servers", "trainers")
"""What grows: a row's case has one of them."""

WARM_UP = 2
STEPS = 5


@dataclass(frozen=True)
class Shape:
    """Of a GPT."""

    layers: int
    width: int
    heads: int


SIZES = {"10 M": Shape(3, 512, 8), "35 M": Shape(11, 512, 8), "151 M": Shape(12, 1024, 16), "403 M": Shape(8, 2048, 16)}
LARGEST = {"1 B": Shape(20, 2048, 16)}
"""On disk only: all of its state would be most of a small machine's memory."""

BUDGET_SHARE = 0.1
"""What servers whose state is on disk have of it in memory."""


def run(quick: bool) -> list[report.Row]:
    """The rows of three series: model sizes in memory and on disk, servers, trainers."""
    sizes = dict(list(SIZES.items())[:2]) if quick else SIZES
    on_disk = dict(list(SIZES.items())[:1]) if quick else {**SIZES, **LARGEST}
    counts = (1, 2) if quick else (1, 2, 4)
    middle = SIZES["10 M" if quick else "151 M"]
    rows = _series("model", [({"model": name}, (shape, 2, 1, False)) for name, shape in sizes.items()], True)
    rows += _series("model, on disk", [({"model": name}, (shape, 2, 1, True)) for name, shape in on_disk.items()], True)
    rows += _series("servers", [({"servers": n}, (middle, n, 1, False)) for n in counts])
    rows += _series("trainers", [({"trainers": n}, (middle, 2, n, False)) for n in counts])
    return rows


@dataclass(frozen=True)
class Measured:
    """Of one run. moved: bytes a step, all trainers together. Peaks are bytes, of the largest process of its kind."""

    seconds: float
    parameters: int
    moved: Mapping[str, float]
    processor: float
    trainer_peak: int
    server_peak: int


@cache
def _measured(shape: Shape, servers: int, trainers: int, on_disk: bool) -> Measured:
    work = Workload(1, 64, shape.layers, shape.width, shape.heads, world_size=trainers, threads=max(1, 2 // trainers))
    memory = work.memory_limit(BUDGET_SHARE, servers) if on_disk else None
    with LocalCluster(servers, memory=memory) as cluster:
        work = work.with_options(servers=",".join(cluster.addresses))
        pids = {f"server {index}": cluster.pid(index) for index in range(servers)}
        environment = {"OMP_WAIT_POLICY": "passive"}
        with Ranks("zero-ps", sys.executable, "benchmarks.sides.offloaded", work, lambda: pids, environment) as ranks:
            ranks.wait_ready()
            ranks.block(WARM_UP)
            block: Block = ranks.block(STEPS)
            peaks = ranks.peak_bytes()
    return Measured(
        statistics.median(block.seconds),
        work.parameters,
        {way: size / STEPS for way, size in block.moved.items()},
        block.processor_seconds / STEPS,
        max(peak for name, peak in peaks.items() if name.startswith("trainer")),
        max(peak for name, peak in peaks.items() if name.startswith("server")),
    )


def _series(
    name: str, runs: Sequence[tuple[report.Case, tuple[Shape, int, int, bool]]], by_parameters: bool = False
) -> list[report.Row]:
    """runs: what `_measured` is given. One that fails is left out, and said to be."""
    rows: list[report.Row] = []
    first: Measured | None = None
    for case, how in runs:
        case = {"series": name, **case}
        try:
            one = _measured(*how)
        except SideError as error:
            print(f"{case}: left out: {error}", file=sys.stderr, flush=True)
            continue
        first = first or one
        print(f"{case}: {one.seconds:.2f} s a step", file=sys.stderr, flush=True)
        against = "the first of the series"
        rows.append(report.Row("step", one.seconds, "s", against, one.seconds / first.seconds, case=case))
        if by_parameters:
            each, least = one.seconds / one.parameters, first.seconds / first.parameters
            rows.append(report.Row("step", each * 1e9, "ns a parameter", against, each / least, case=case))
        processor = one.processor / first.processor
        rows.append(report.Row("processor time", one.processor, "s a step", against, processor, case=case))
        rows += [
            report.Row(way, size / 1e6, "MB a step", against, size / first.moved[way], case=case)
            for way, size in one.moved.items()
        ]
        rows.append(report.Row("peak memory of a trainer", one.trainer_peak / 2**20, "MiB", case=case))
        rows.append(report.Row("peak memory of a server", one.server_peak / 2**20, "MiB", case=case))
    return rows


if __name__ == "__main__":
    sys.exit(report.main(__doc__, run))
