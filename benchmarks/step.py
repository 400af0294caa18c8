"""What a step costs with the model elsewhere, against plain torch and against what people would use instead.

    python -m benchmarks.step --case movement --trainers 1 --against plain,deepspeed-cpu

A GPT of 151 M parameters over bytes, bf16 with fp32 AdamW: the same model, initial values, data and number of
threads for every side. Sides take turns in blocks of steps, so that whatever else the machine does meets all of
them; medians, and the ratio to plain torch of the same run. Servers run on the same cores as trainers, and their
processor time and memory count. Two trainers have one thread each and half of the sequences of a compute-bound
step; plain torch then does the work of both in one process of two threads.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

from benchmarks import report
from benchmarks.peers import deepspeed_environment, not_compiled, python_with
from benchmarks.sides.process import Block, Ranks, SideError
from benchmarks.workload import Workload
from ps import LocalCluster
from trainer import OffloadConfig

THREADS = 2
WARM_UP = 2
"""Steps of a block that do not count: the first one guesses what comes, the second one learns how long it takes."""

PLAIN = "plain"
PEERS = ("deepspeed-cpu", "deepspeed-nvme", "fsdp2")


@dataclass(frozen=True)
class Variant:
    """zero-ps in one of its ways.

    memory_share: what the servers' limit is of the shard; None for no limit. max_live_bytes: of each trainer.
    """

    servers: int = 2
    links: tuple[str, ...] | None = None
    memory_share: float | None = None
    max_live_bytes: int | None = None


VARIANTS = {
    "memory": Variant(),
    "disk": Variant(memory_share=0.1),
    "budget": Variant(max_live_bytes=64 << 20),
    "1-server": Variant(servers=1),
    "grpc": Variant(links=("grpc",)),
    "gloo": Variant(links=("gloo", "grpc")),
}

# By case, trainers and variant: against which side, and at most which ratio.
BARS: Mapping[tuple[str, int, str], tuple[tuple[str, float], ...]] = {
    ("compute", 1, "memory"): ((PLAIN, 1.15),),
    ("movement", 1, "memory"): ((PLAIN, 2.0),),
    ("compute", 1, "disk"): ((PLAIN, 1.6),),
    ("movement", 1, "disk"): (("deepspeed-nvme", 0.8),),
    ("compute", 2, "memory"): (("deepspeed-cpu", 0.85),),
    ("movement", 2, "memory"): (("deepspeed-cpu", 0.85),),
}

BUDGET_BAR = 1.1
"""How much of its budget a trainer may take."""

LOSS_TOLERANCE = 0.05
"""By how much the losses of two sides may differ in the mean of all steps, as a share, where they do not round to bf16
at the same places. With one trainer zero-ps does: its losses are plain torch's bit for bit."""


@dataclass(frozen=True)
class Plan:
    """What to measure. small: a model that makes a step in a tenth of a second, to try things out."""

    against: Sequence[str] = (PLAIN, *PEERS)
    variants: Sequence[str] = ("memory", "disk")
    cases: Sequence[str] = ("compute", "movement")
    trainers: Sequence[int] = (1, 2)
    blocks: int = 3
    steps: int = 4
    small: bool = False

    def work(self, case: str, trainers: int) -> Workload:
        batch, length = (4 // trainers, 256) if case == "compute" else (1, 64)
        work = Workload(batch, length, world_size=trainers, threads=THREADS // trainers)
        return replace(work, layers=4, width=256, heads=4) if self.small else work


@dataclass
class Figures:
    """Of one side, over all blocks; seconds without those of warming up."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    moved: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    activation_bytes: int = 0
    beyond_start_bytes: int = 0

    def add(self, block: Block) -> None:
        self.seconds += block.seconds[WARM_UP:]
        self.losses += block.losses
        steps = len(block.seconds)
        self.processor.append(block.processor_seconds / steps)
        self.activation_bytes = max(self.activation_bytes, block.activation_bytes)
        self.moved = {key: value / steps for key, value in block.moved.items()}


QUICK = Plan((PLAIN, "deepspeed-cpu", "fsdp2"), cases=("movement",), trainers=(1,), blocks=1, steps=3, small=True)


def run(quick: bool) -> list[report.Row]:
    """The rows of everything, or of a small model."""
    return measure(QUICK if quick else Plan())


def measure(plan: Plan, say: Callable[[str], None] = lambda text: None) -> list[report.Row]:
    """The rows of every case. A side that cannot run here is left out, and said to be."""
    rows = []
    for case in plan.cases:
        for trainers in plan.trainers:
            rows += _case(plan, case, trainers, say)
    return rows


def _case(plan: Plan, case: str, trainers: int, say: Callable[[str], None]) -> list[report.Row]:
    work = plan.work(case, trainers)
    figures: dict[str, Figures] = {}
    with ExitStack() as stack:
        sides: dict[str, Ranks] = {}
        for name in (*plan.against, *plan.variants):
            try:
                side = stack.enter_context(started(name, work))
                side.wait_ready()
            except SideError as error:
                say(f"{case}, trainers {trainers}: left out: {error}")
                continue
            sides[name] = side
            figures[name] = Figures()
        for number in range(plan.blocks):
            for name, side in list(sides.items()):
                try:
                    figures[name].add(side.block(WARM_UP + plan.steps))
                except SideError as error:
                    say(f"{case}, trainers {trainers}: left out from here on: {error}")
                    del sides[name], figures[name]
                    continue
                if number == plan.blocks - 1:
                    figures[name].peaks = side.peak_bytes()
                    figures[name].beyond_start_bytes = side.beyond_start_bytes()
                seconds = statistics.median(figures[name].seconds)
                say(f"{case}, trainers {trainers}, block {number + 1}/{plan.blocks}: {name} {seconds:.3f} s a step")
    for name, found in figures.items():
        say(f"{case}, trainers {trainers}: losses of {name}: " + " ".join(f"{loss:.4f}" for loss in found.losses[:6]))
    return _rows(case, trainers, figures, bars=not plan.small)


@contextmanager
def started(name: str, work: Workload) -> Iterator[Ranks]:
    """A side's processes. Raises SideError where it cannot run here."""
    if name == PLAIN:
        alone = replace(work, world_size=1, threads=THREADS).with_options(ranks=str(work.world_size))
        with Ranks(name, sys.executable, "benchmarks.sides.plain", alone) as ranks:
            yield ranks
    elif name == "fsdp2":
        with Ranks(name, sys.executable, "benchmarks.sides.fsdp2", work) as ranks:
            yield ranks
    elif name.startswith("deepspeed-"):
        with _deepspeed(name, work) as ranks:
            yield ranks
    else:
        with _offloaded(name, VARIANTS[name], work) as ranks:
            yield ranks


@contextmanager
def _deepspeed(name: str, work: Workload) -> Iterator[Ranks]:
    python = python_with("deepspeed")
    if python is None:
        raise SideError(f"{name}: DeepSpeed is not installed; `make bench-peers` does that")
    of_disk = ("pin_memory", "async_io") if name == "deepspeed-nvme" else ()
    for operator in ("cpu_adam", "deepspeed_shm_comm", *of_disk):
        if (why := not_compiled(python, operator)) is not None:
            raise SideError(f"{name}: DeepSpeed's {operator}: {why}; `make bench-peers` compiles it")
    with tempfile.TemporaryDirectory(prefix="zero-ps-deepspeed-") as folder:
        device = name.removeprefix("deepspeed-")
        work = work.with_options(device=device, folder=folder)
        with Ranks(name, python, "benchmarks.sides.zero3", work, environment=deepspeed_environment(python)) as ranks:
            yield ranks


@contextmanager
def _offloaded(name: str, variant: Variant, work: Workload) -> Iterator[Ranks]:
    share = variant.memory_share
    memory = None if share is None else work.memory_limit(share, variant.servers)
    with LocalCluster(variant.servers, links=variant.links, memory=memory) as cluster:
        options = {"servers": ",".join(cluster.addresses)}
        if variant.max_live_bytes is not None:
            options["max_live_bytes"] = str(variant.max_live_bytes)
        work = work.with_options(**options)
        servers = {f"server {index}": cluster.pid(index) for index in range(variant.servers)}
        # Servers need the cores on which OpenMP's threads would spin while they wait for each other.
        environment = {"OMP_WAIT_POLICY": "passive"}
        module = "benchmarks.sides.offloaded"
        with Ranks(name, sys.executable, module, work, lambda: servers, environment) as ranks:
            yield ranks


# ---------------------------------------------------------------- rows


def _rows(case: str, trainers: int, figures: Mapping[str, Figures], bars: bool) -> list[report.Row]:
    rows = []
    median = {name: statistics.median(found.seconds) for name, found in figures.items()}
    for name, found in figures.items():
        side = f"zero-ps, {name}" if name in VARIANTS else name
        at: report.Case = {"case": case, "trainers": trainers, "side": side}
        spread = (max(found.seconds) - min(found.seconds)) / median[name]
        bar = dict(BARS.get((case, trainers, name), ())) if bars else {}
        with_spread = {**at, "spread": round(spread, 2)}
        if PLAIN not in median:
            rows.append(report.Row("step", median[name], "s", case=with_spread))
        for other in (PLAIN, *(peer for peer in bar if peer != PLAIN)):
            if other in median:
                ratio = median[name] / median[other]
                rows.append(
                    report.Row("step", median[name], "s", other, ratio, at_most=bar.get(other), case=with_spread)
                )
        processor = statistics.median(found.processor)
        rows.append(report.Row("processor time", processor, "s a step", case=at))
        rows += [
            report.Row("peak memory", peak / (1 << 20), "MiB", case={**at, "process": process})
            for process, peak in found.peaks.items()
        ]
        # Plain torch has the activations of all trainers.
        if name in VARIANTS and PLAIN in figures and trainers == 1:
            rows.append(_memory_row(name, found, figures[PLAIN], at, bars))
        rows += [report.Row(way, size / 1e6, "MB a step", case=at) for way, size in found.moved.items()]
        if PLAIN in figures:
            expected = figures[PLAIN].losses
            pairs = list(zip(found.losses, expected, strict=True))
            apart = statistics.fmean(abs(one - other) / other for one, other in pairs)
            equal, same = sum(one == other for one, other in pairs), name in VARIANTS and trainers == 1
            rows.append(
                report.Row(
                    "losses apart", apart, "of plain's", "what is allowed", apart / LOSS_TOLERANCE, at_most=1, case=at
                )
            )
            all_of_them = 1 if same else None
            rows.append(
                report.Row(
                    "losses equal bit for bit", equal, "steps", "all", equal / len(pairs), at_least=all_of_them, case=at
                )
            )
    return rows


def _memory_row(name: str, found: Figures, plain: Figures, at: report.Case, bars: bool) -> report.Row:
    """What a trainer's peak has beside the activations that plain torch has, too."""
    beyond = found.beyond_start_bytes - plain.activation_bytes
    what, limit = "trainer's peak beyond plain torch's activations", VARIANTS[name].max_live_bytes
    if limit is None:
        return report.Row(what, beyond / (1 << 20), "MiB", case=at)
    ratio = beyond / (limit + OffloadConfig().max_inflight_push_bytes)
    against, bar = "max_live_bytes and max_inflight_push_bytes", BUDGET_BAR if bars else None
    return report.Row(what, beyond / (1 << 20), "MiB", against, ratio, at_most=bar, case=at)


def main() -> int:
    plan = Plan()
    parser = report.parser(__doc__)
    parser.add_argument(
        "--against",
        type=names(PLAIN, *PEERS),
        metavar="SIDE,...",
        help=f"of {PLAIN}, {', '.join(PEERS)}",
    )
    parser.add_argument(
        "--variants",
        type=names(*VARIANTS),
        metavar="NAME,...",
        help=f"of zero-ps: {', '.join(VARIANTS)} (default: {','.join(plan.variants)})",
    )
    parser.add_argument("--case", choices=("compute", "movement"), action="append", help="(default: both)")
    parser.add_argument("--trainers", type=int, choices=(1, 2), action="append", help="(default: 1, then 2)")
    parser.add_argument("--blocks", type=report.at_least_one, help=f"turns of each side (default: {plan.blocks})")
    parser.add_argument("--steps", type=report.at_least_one, help=f"of a turn that count (default: {plan.steps})")
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else plan
    plan = replace(
        plan,
        against=arguments.against or plan.against,
        variants=arguments.variants or plan.variants,
        cases=arguments.case or plan.cases,
        trainers=arguments.trainers or plan.trainers,
        blocks=arguments.blocks or plan.blocks,
        steps=arguments.steps or plan.steps,
    )
    return report.conclude(measure(plan, lambda text: print(text, file=sys.stderr, flush=True)), arguments)


def names(*known: str) -> Callable[[str], tuple[str, ...]]:
    """How a flag's names, joined by commas, are read: each has to be one of these."""

    def parse(text: str) -> tuple[str, ...]:
        # Once each.
        names = tuple(dict.fromkeys(text.split(",")))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return names

    return parse


if __name__ == "__main__":
    sys.exit(main())
