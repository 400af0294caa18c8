"""What looking ahead brings, and what the coordinator itself costs.

Steps of a GPT of 151 M parameters in bf16 with fp32 AdamW, two servers on the same machine: with prefetching
and without it, and in plain torch. Sides take turns in blocks of steps. Within a block each step begins
while the servers still update for the one before, as in training; blocks do not overlap. What the model
waits for is then transfers or updates; on the side "prefetch, after the update" it is transfers alone. Updates
begin during backward, but for the side "prefetch, updated after backward".

Then stacks of tiny layers, where nothing is computed and next to nothing moves: processor time spent in the
coordinator for each call of a module.
"""

import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import trainer
from benchmarks import report
from benchmarks.plain import PlainTraining
from ps import LocalCluster
from trainer.app.gpt import GPT, GPTConfig
from trainer.coordinator import Coordinator
from trainer.offload import find

WORKS = {"compute-bound": (4, 256), "movement-bound": (1, 64)}
"""Batch and sequence."""

CONFIGS = {
    "prefetch": trainer.OffloadConfig(),
    "prefetch, released after each use": trainer.OffloadConfig(max_reuse_distance=0),
    "on demand": trainer.OffloadConfig(prefetch_bucket_size=0, max_reuse_distance=0),
    "prefetch, after the update": trainer.OffloadConfig(),
    "prefetch, updated after backward": trainer.OffloadConfig(),
}
SETTLED = "prefetch, after the update"
"""Steps here begin when the servers are done with the one before."""

LATE = "prefetch, updated after backward"
"""Servers do not know of a backward here that it is the last one of its step."""

PLAIN = "plain torch"

WARM_UP = 2
"""Steps of a block that do not count: the first one guesses, the second one learns how long things take."""


def run(quick: bool) -> list[report.Row]:
    """The rows of steps with and without looking ahead, and of the coordinator's own cost. quick: a small model."""
    torch.set_num_threads(2)
    rows = []
    for work in WORKS:
        rows += _steps(work, quick)
    torch.set_num_threads(1)
    with LocalCluster(servers=2) as cluster:
        rows += _own_cost(cluster, sizes=(100, 1000) if quick else (100, 1000, 10_000), passes=5 if quick else 9)
    return rows


# ---------------------------------------------------------------- steps


@dataclass
class Figures:
    """Of the steps of one side: seconds of each, and of those the seconds that the model waited for
    parameters, the part of that before its first block, and the seconds for which parameters were on
    their way."""

    steps: list[float] = field(default_factory=list)
    stalled: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    transfers: list[float] = field(default_factory=list)

    @property
    def hidden(self) -> float:
        """Seconds a step of transfers in which the model did not wait, over all steps."""
        return statistics.fmean(self.transfers) - statistics.fmean(self.stalled)


def _steps(work: str, quick: bool) -> list[report.Row]:
    config = GPTConfig(layers=4, width=512, heads=8, context=256) if quick else GPTConfig(12, 1024, 16, 256)
    blocks, steps = (1, 3) if quick else (3, 4)
    batch, length = WORKS[work]
    x, y = torch.randint(0, 256, (2, batch, length))
    sides = {name: Figures() for name in (PLAIN, *CONFIGS)}
    with LocalCluster(servers=2) as cluster, trainer.connect(cluster.addresses, job="gpt") as job:
        model = GPT(config).to(torch.bfloat16)
        plain = PlainTraining(GPT(config).to(torch.bfloat16), lr=1e-4)
        for _ in range(blocks):
            for _ in range(WARM_UP + steps):
                begin = time.perf_counter()
                plain.step(x, y)
                sides[PLAIN].steps.append(time.perf_counter() - begin)
            del sides[PLAIN].steps[-WARM_UP - steps : -steps]
            for name, offload_config in CONFIGS.items():
                _block(
                    model, job, offload_config, x, y, steps, sides[name], settled=name == SETTLED, early=name != LATE
                )
    return _step_rows(work, sides, bar=0.9 if work == "compute-bound" and not quick else None)


def _block(
    model: GPT,
    job: trainer.Job,
    config: trainer.OffloadConfig,
    x: torch.Tensor,
    y: torch.Tensor,
    steps: int,
    figures: Figures,
    *,
    settled: bool,
    early: bool,
) -> None:
    """Offloads the model, makes a few steps, and takes it back whole, which waits for the last update.

    settled: waits for it before each step, too. early: lets servers update during backward.
    """
    trainer.offload(model, job, config)
    optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-4)
    after_first: list[float] = []
    # Only the embeddings come before the first block, and take next to no time.
    handle = model.blocks[0].register_forward_pre_hook(
        lambda *_: after_first.append(trainer.report(model).total_stalled_seconds)
    )
    for step in range(WARM_UP + steps):
        if settled:
            # Servers update last what is used last.
            with trainer.gathered(list(model.parameters())[-8:]):
                pass
        before = trainer.report(model)
        begin = time.perf_counter()
        loss = model(x, y)
        with optimizer.last_backward() if early else nullcontext():
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - begin
        after = trainer.report(model)
        if step >= WARM_UP:
            figures.steps.append(seconds)
            figures.stalled.append(after.total_stalled_seconds - before.total_stalled_seconds)
            figures.first.append(after_first[-1] - before.total_stalled_seconds)
            figures.transfers.append(after.transfer_seconds - before.transfer_seconds)
    handle.remove()
    trainer.remove(model)


def _step_rows(work: str, sides: dict[str, Figures], bar: float | None) -> list[report.Row]:
    rows = []
    seconds = {name: statistics.median(figures.steps) for name, figures in sides.items()}
    for name in (PLAIN, *CONFIGS):
        case: dict[str, str | int | float] = {"work": work, "side": name}
        rows.append(report.Row("step", seconds[name], "s", PLAIN, seconds[name] / seconds[PLAIN], case=case))
    for name in ("prefetch", "prefetch, released after each use"):
        ratio = seconds[name] / seconds["on demand"]
        rows.append(report.Row("step", seconds[name], "s", "on demand", ratio, case={"work": work, "side": name}))
    for name in CONFIGS:
        figures, case = sides[name], {"work": work, "side": name}
        transfers, stalled = statistics.fmean(figures.transfers), statistics.fmean(figures.stalled)
        first, step = statistics.fmean(figures.first), statistics.fmean(figures.steps)
        hidden = max(0.0, figures.hidden)
        at_least = bar if name == "prefetch" else None
        rows += [
            report.Row("hidden", hidden, "s a step", "transfers", hidden / transfers, at_least=at_least, case=case),
            report.Row(
                "hidden, from the first block on",
                hidden,
                "s a step",
                "transfers",
                hidden / (transfers - first),
                case=case,
            ),
            report.Row("stalled", stalled, "s a step", "the step", stalled / step, case=case),
            report.Row(
                "stalled before the first block", first, "s a step", "stalled", first / max(stalled, 1e-9), case=case
            ),
        ]
    return rows


# ---------------------------------------------------------------- the coordinator's own cost

WIDTH = 8

MOST_GROWTH = 1.3
"""By which a call may cost more in the largest model than in the smallest."""


def _own_cost(cluster: LocalCluster, sizes: Sequence[int], passes: int) -> list[report.Row]:
    rows = []
    for where in ("resident", "pulled"):
        found = [_per_call(cluster, modules, where, passes) for modules in sizes]
        for direction in ("forward", "backward"):
            smallest = found[0][direction]
            for modules, us in zip(sizes, found, strict=True):
                case: dict[str, str | int | float] = {"modules": modules, "parameters": where}
                bar = MOST_GROWTH if modules == sizes[-1] else None
                rows.append(
                    report.Row(
                        f"own cost, {direction}",
                        us[direction],
                        "us a call",
                        f"{sizes[0]} modules",
                        us[direction] / smallest,
                        at_most=bar,
                        case=case,
                    )
                )
    return rows


def _per_call(cluster: LocalCluster, modules: int, where: str, passes: int) -> dict[str, float]:
    """Microseconds of this thread's processor time in the coordinator for each module, forward and backward.

    where: "resident" parameters always stay; those that are "pulled" come anew in each forward.
    """
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(modules))).requires_grad_(False)
    elements = modules * WIDTH * WIDTH
    # One more than there are: a parameter stays that has fewer than that.
    stays = elements + 1 if where == "resident" else 0
    config = trainer.OffloadConfig(param_persistence_threshold=stays, model_persistence_threshold=elements)
    times: dict[str, list[float]] = {"forward": [], "backward": []}
    x = torch.randn(1, WIDTH, requires_grad=True)
    # A short pass is repeated, so that one disturbance does not weigh more in it than in a long one.
    repeat = max(1, 1000 // modules)
    with trainer.connect(cluster.addresses, job=f"own-cost-{where}-{modules}") as job:
        trainer.offload(model, job, config)
        offloaded = find(model)
        assert offloaded is not None
        with _metered(offloaded.coordinator) as meter:
            for _ in range(WARM_UP):
                model(x).sum().backward()
            # As timeit does: a full collection walks every object of a large model, whoever sets it off.
            gc.collect()
            gc.disable()
            for _ in range(passes):
                forward = backward = 0.0
                for _ in range(repeat):
                    meter.seconds = 0.0
                    out = model(x)
                    forward += meter.seconds
                    meter.seconds = 0.0
                    out.sum().backward()
                    backward += meter.seconds
                times["forward"].append(forward / repeat)
                times["backward"].append(backward / repeat)
            gc.enable()
    return {direction: statistics.median(seconds) / modules * 1e6 for direction, seconds in times.items()}


class _Meter:
    """Adds up the processor time of calls, without its own."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0
        self._own = 0.0
        nothing = self.around(lambda: None)
        samples = []
        for _ in range(2000):
            before = self.seconds
            nothing()
            samples.append(self.seconds - before)
        self._own = statistics.median(samples)

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def metered(*args: Any, **kwargs: Any) -> Any:
            if self._depth:
                return call(*args, **kwargs)
            self._depth += 1
            begin = time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - begin - self._own
                self._depth -= 1

        return metered


_ENTRIES = (
    "begin_forward",
    "end_forward",
    "begin_backward",
    "end_backward",
    "fetch",
    "release",
    "unsaved",
)
"""What hooks call of the coordinator."""


@contextmanager
def _metered(coordinator: Coordinator) -> Iterator[_Meter]:
    meter = _Meter()
    for name in _ENTRIES:
        setattr(coordinator, name, meter.around(getattr(coordinator, name)))
    try:
        yield meter
    finally:
        for name in _ENTRIES:
            delattr(coordinator, name)


if __name__ == "__main__":
    sys.exit(report.main(__doc__, run))
