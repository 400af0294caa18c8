"""What the hooks around a module cost when there is nothing to fetch.

Stacks of tiny linear layers, all of whose parameters stay gathered, against the same stack in plain torch:
what is left is Python's time for the hooks themselves, and for a note in place of each saved weight. It is
processor time of the trainer's process, all of its threads: on a busy machine the clock would count others'.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import trainer
from benchmarks import report
from ps import LocalCluster

WIDTH = 8


@dataclass(frozen=True)
class Work:
    """What is timed.

    frozen: without gradients of parameters, so that backward has weights to restore and none to send.
    """

    name: str
    backward: bool
    frozen: bool


WORKS = (
    Work("forward", backward=False, frozen=True),
    Work("forward and backward, frozen", backward=True, frozen=True),
    Work("forward and backward, gradients sent", backward=True, frozen=False),
)


def run(quick: bool) -> list[report.Row]:
    """The rows of 100 and 1000 modules, of 100 when quick."""
    torch.set_num_threads(1)
    rows = []
    with LocalCluster(servers=2) as cluster:
        for modules in (100,) if quick else (100, 1000):
            for hooked in ("each module", "one unit"):
                for work in WORKS:
                    job = f"{modules}-{hooked}-{work.name}".replace(" ", "-").replace(",", "")
                    rows += _measure(cluster, job, modules, hooked, work, pairs=9 if quick else 31)
    return rows


def _stack(modules: int, frozen: bool) -> nn.Module:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(modules)))
    return model.requires_grad_(not frozen)


def _measure(
    cluster: LocalCluster, job_name: str, modules: int, hooked: str, work: Work, pairs: int
) -> list[report.Row]:
    plain, model = _stack(modules, work.frozen), _stack(modules, work.frozen)
    elements = sum(param.numel() for param in model.parameters())
    config = trainer.OffloadConfig(
        param_persistence_threshold=elements,
        module_granularity_threshold=elements if hooked == "one unit" else 0,
    )
    with trainer.connect(cluster.addresses, job=job_name) as job:
        trainer.offload(model, job, config)
        of_plain, of_model = _times(_call(plain, work), _call(model, work), pairs)
    plain_us, model_us = of_plain / modules * 1e6, of_model / modules * 1e6
    case: dict[str, str | int | float] = {"work": work.name, "modules": modules, "hooks": hooked}
    return [
        report.Row("module call", model_us, "us", "plain torch", model_us / plain_us, case=case),
        report.Row("added by hooks", model_us - plain_us, "us", case=case),
    ]


def _call(model: nn.Module, work: Work) -> Callable[[], float]:
    """A function that does the work once and returns the seconds of processor time it took."""
    x = torch.randn(1, WIDTH, requires_grad=work.backward)

    def call() -> float:
        with torch.set_grad_enabled(work.backward):
            begin = time.process_time()
            out = model(x)
            if work.backward:
                out.sum().backward()
            seconds = time.process_time() - begin
        model.zero_grad()
        x.grad = None
        return seconds

    return call


def _times(first: Callable[[], float], second: Callable[[], float], pairs: int) -> tuple[float, float]:
    """Medians of the two in turn."""
    for _ in range(2):
        first()
        second()
    times = [(first(), second()) for _ in range(pairs)]
    return statistics.median(a for a, _ in times), statistics.median(b for _, b in times)


if __name__ == "__main__":
    sys.exit(report.main(__doc__, run))
