"""Where the time of a step goes, for trainers and servers side by side.

    python -m benchmarks.profile --case movement --side memory,plain

Wall clock, of each trainer's own thread: forward, backward and update, each divided into what it ran, what it
waited for parameters, what it was ready to run while others had the processors, and what else it waited for, as
gradients that have to leave or other threads' part of a computation. Processor seconds, of all threads of each
process, by what they did: Linux's `perf` says that by looking 299 times a second; without it there is only their
sum. Bytes of links and of the disk, and for how long the disk was busy. All for one step, the mean of a block.

Sides and cases are those of `benchmarks.step`. `--symbols 20` also shows where in the code each process was found.
"""

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import report, step
from benchmarks.processes import Disk, Schedule, disk_busy_seconds, disk_bytes, processor_seconds, schedule
from benchmarks.sampling import Samples, available, sampled
from benchmarks.sides.phases import PHASES
from benchmarks.sides.process import Block, Ranks, SideError

WARM_UP = 3
PLAN = step.Plan(steps=8)
QUICK = step.Plan(cases=("movement",), steps=3, small=True)
SIDES = (step.PLAIN, "memory", "disk")

MIB = 1 << 20


@dataclass(frozen=True)
class Usage:
    """Of a process since its start."""

    processor: float
    schedule: Schedule
    disk: Disk

    @staticmethod
    def of(pid: int) -> "Usage":
        return Usage(processor_seconds(pid), schedule(pid), disk_bytes(pid))


@dataclass(frozen=True)
class Profile:
    """A block of steps. before, after: of each process, by its name. disk_busy: seconds."""

    steps: int
    block: Block
    pids: Mapping[str, int]
    before: Mapping[str, Usage]
    after: Mapping[str, Usage]
    disk_busy: float
    samples: Samples


def run(quick: bool) -> list[report.Row]:
    """The rows of plain torch and of zero-ps in memory, in both cases; of a small model when quick."""
    if quick:
        return profiled(QUICK, SIDES[:2], 1, QUICK.steps)
    return profiled(PLAN, SIDES, 1, PLAN.steps)


def profiled(plan: step.Plan, sides: Sequence[str], trainers: int, steps: int, symbols: int = 0) -> list[report.Row]:
    """The rows of sides, one after the other; prints a table of each."""
    rows = []
    for case in plan.cases:
        work = plan.work(case, trainers)
        for side in sides:
            at: report.Case = {"case": case, "trainers": trainers, "side": side}
            try:
                with step.started(side, work) as ranks:
                    found = _look(ranks, steps)
            except SideError as error:
                print(f"{case}, trainers {trainers}: left out: {error}", file=sys.stderr)
                continue
            rows_of_side = _rows(found, at)
            print(_sheet(rows_of_side, at), end="\n\n", flush=True)
            if symbols:
                print(_symbols(found, symbols), end="\n\n", flush=True)
            rows += rows_of_side
    return rows


def _look(ranks: Ranks, steps: int) -> Profile:
    ranks.wait_ready()
    ranks.block(WARM_UP)
    pids = ranks.pids()
    folder = Path(tempfile.gettempdir())
    with sampled(list(pids.values())) as samples:
        before, busy = {name: Usage.of(pid) for name, pid in pids.items()}, disk_busy_seconds(folder)
        block = ranks.block(steps)
        after, busy = {name: Usage.of(pid) for name, pid in pids.items()}, disk_busy_seconds(folder) - busy
    return Profile(steps, block, pids, before, after, busy, samples)


# ---------------------------------------------------------------- rows

STEP = "the step"


def _rows(found: Profile, at: report.Case) -> list[report.Row]:
    """All of them a step; ratios are shares of the step's wall clock."""
    wall = sum(found.block.seconds) / found.steps
    rows = [report.Row("step", wall, "s", case=at)]

    def add(name: str, seconds: float, process: str) -> None:
        case = {**at, "process": process}
        rows.append(report.Row(name, seconds, "s a step", STEP, seconds / wall, case=case))

    for rank, spent in enumerate(found.block.spent):
        for name, seconds in _wall(spent).items():
            add(f"wall: {name}", seconds / found.steps, f"trainer {rank}")
    for name, pid in found.pids.items():
        before, after = found.before[name], found.after[name]
        processor = (after.processor - before.processor) / found.steps
        add("processor: all", processor, name)
        for kind, share in found.samples.shares(pid).items():
            add(f"processor: {kind}", share * processor, name)
        # Of threads that ended meanwhile nobody knows.
        add("ready, but no processor free", max(0.0, after.schedule.ready - before.schedule.ready) / found.steps, name)
        for way in ("read", "written"):
            moved = getattr(after.disk, way) - getattr(before.disk, way)
            rows.append(
                report.Row(f"disk: {way}", moved / found.steps / MIB, "MiB a step", case={**at, "process": name})
            )
    for way, size in found.block.moved.items():
        rows.append(report.Row(way, size / found.steps / MIB, "MiB a step", case={**at, "process": "all trainers"}))
    add("disk: busy", found.disk_busy / found.steps, "all")
    return rows


def _wall(spent: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each phase by what the trainer's thread did in it."""
    found: dict[str, float] = {}
    for phase in PHASES:
        whole, running, ready = spent[phase], spent[f"{phase} running"], spent[f"{phase} ready"]
        # What it waits for parameters it can spend ready, too, once they have come.
        stalled = min(spent.get(f"{phase} stalled", 0.0), max(0.0, whole - running))
        ready = min(ready, max(0.0, whole - running - stalled))
        found |= {
            phase: whole,
            f"{phase}: running": running,
            f"{phase}: waiting for parameters": stalled,
            f"{phase}: ready, no processor free": ready,
            f"{phase}: waiting for other things": max(0.0, whole - running - stalled - ready),
        }
    return found


# ---------------------------------------------------------------- on screen


def _sheet(rows: Sequence[report.Row], at: report.Case) -> str:
    """A column for each process; milliseconds, or MiB."""
    columns = list(dict.fromkeys(str(row.case["process"]) for row in rows if "process" in row.case))
    lines: dict[str, dict[str, float]] = {}
    for row in rows:
        if "process" in row.case:
            label = f"{row.name}, {'ms' if row.unit == 's a step' else row.unit.removesuffix(' a step')}"
            scale = 1e3 if row.unit == "s a step" else 1.0
            lines.setdefault(label, {})[str(row.case["process"])] = row.value * scale
    order = {"wall": 0, "processor": 1}
    named = sorted(lines.items(), key=lambda line: order.get(line[0].partition(":")[0], 2))
    width = max(map(len, lines))
    title = ", ".join(f"{key} {value}" for key, value in at.items())
    head = f"{title}: a step takes {rows[0].value * 1e3:.0f} ms"
    heading = " " * width + "".join(f"{column:>14}" for column in columns)
    body = [
        f"{label:<{width}}" + "".join(f"{values[c]:>14.0f}" if c in values else " " * 14 for c in columns)
        for label, values in named
        if any(round(value) for value in values.values())
    ]
    return "\n".join([head, heading, *body])


def _symbols(found: Profile, most: int) -> str:
    lines = []
    for name, pid in found.pids.items():
        processor = (found.after[name].processor - found.before[name].processor) / found.steps
        lines.append(f"{name}: {processor * 1e3:.0f} ms of processors a step")
        lines += [
            f"{share * processor * 1e3:>8.0f} ms  {symbol[:150]}" for symbol, share in found.samples.symbols(pid, most)
        ]
    return "\n".join(lines)


def main() -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--case", choices=("compute", "movement"), action="append", help="(default: both)")
    known = (step.PLAIN, *step.PEERS, *step.VARIANTS)
    parser.add_argument(
        "--side",
        type=step.names(*known),
        metavar="SIDE,...",
        help=f"of {', '.join(known)} (default: {','.join(SIDES)})",
    )
    parser.add_argument("--trainers", type=int, choices=(1, 2), default=1, help="(default: %(default)s)")
    parser.add_argument("--steps", type=report.at_least_one, help=f"to take the mean of (default: {PLAN.steps})")
    parser.add_argument(
        "--symbols", type=report.at_least_one, default=0, metavar="N", help="show so many symbols of each process"
    )
    arguments = parser.parse_args()
    if not available():
        print("perf is not installed: what processors did is not divided by kind", file=sys.stderr)
    plan, sides = (QUICK, SIDES[:2]) if arguments.quick else (PLAN, SIDES)
    rows = profiled(
        replace(plan, cases=arguments.case or plan.cases),
        arguments.side or sides,
        arguments.trainers,
        arguments.steps or plan.steps,
        arguments.symbols,
    )
    return report.conclude(rows, arguments, shown=True)


if __name__ == "__main__":
    sys.exit(main())
