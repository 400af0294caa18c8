"""What a step costs, and how much of it training waits for.

The throughput of a server's AdamW in memory, against torch's fused AdamW on one flat tensor of the same size,
with as many threads. How long it takes from the end of a backward to the first layer of the next forward, and
how long all of that forward waits: with updates that begin with `step()`, and with those that begin during
backward (`last_backward`), the shard in memory and on disk. The layers there take their time without a
processor, as if an accelerator computed: servers that update meanwhile take nothing from the trainer. And how
many bytes a step pulls with more and more micro-batches, one after the other or layer by layer.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

import trainer
from benchmarks import report
from benchmarks.storage import WIDTH, opened, server
from protos.values import Option
from ps import LocalCluster
from ps.contributions import Gradient
from ps.job import Job
from ps.monitor import Patience
from ps.opening import set_optimizer
from ps.sessions import Session
from ps.step_wish import StepWish
from ps.store import OptimizerGroup, OptimizerSpec
from ps.tier import Tier

MIB = 1 << 20
PATIENCE = 600.0
OPTIONS: dict[str, Option] = {"lr": 1e-3}


def run(quick: bool) -> list[report.Row]:
    """The rows of updates by themselves, of what the next forward waits for, and of pulls by micro-batches."""
    torch.set_num_threads(1)
    rows = throughput(16 if quick else 64, rounds=5 if quick else 15)
    for where in ("memory", "disk"):
        rows += waiting(where, layers=12 if quick else 32, steps=4 if quick else 12)
    return rows + pulls(layers=6 if quick else 12)


# ---------------------------------------------------------------- throughput


def throughput(matrices: int, rounds: int) -> list[report.Row]:
    """Sides take turns; medians of processor seconds, which are those on the clock where nothing else runs."""
    parameters = matrices * WIDTH * WIDTH
    flat = torch.randn(parameters)
    flat.grad = torch.full_like(flat, 0.01)
    reference = torch.optim.AdamW([flat], lr=1e-3, fused=True)
    ours, theirs = [], []
    with tempfile.TemporaryDirectory(prefix="zero-ps-") as folder, server(Path(folder), Tier()) as (jobs, job):
        session = opened(jobs, matrices)
        group = OptimizerGroup(OPTIONS, tuple(range(matrices)))
        set_optimizer(job, session, OptimizerSpec("AdamW", (group,)), Patience.of(PATIENCE))
        shard = job.open_shard()
        gradients = [Gradient(c, None, job.tier.incoming(c.shape, torch.float32, c.label)) for c in shard]
        for gradient in gradients:
            gradient.values.tensor.fill_(0.01)
        # As nothing zeroes them they are there for every step.
        job.steps.add(session, job.steps.of(session), 0, 0, gradients)
        for step in range(rounds + 2):
            theirs.append(_seconds(reference.step))
            ours.append(_seconds(lambda step=step: _step(job, session, step)))  # type: ignore[misc]
    # The first ones begin the state.
    seconds = statistics.median(ours[2:])
    ratio, rate = statistics.median(theirs[2:]) / seconds, parameters / seconds / 1e6
    case: dict[str, str | int | float] = {"parameters_m": parameters // 10**6}
    return [report.Row("AdamW in memory", rate, "M parameters/s", "one flat tensor", ratio, at_least=0.8, case=case)]


def _step(job: Job, session: Session, step: int) -> None:
    """Returns when every chunk is updated."""
    job.step_from(session, step, StepWish((OPTIONS,), ()), Patience.of(PATIENCE))
    job.wait_at_rest(job.open_shard(), session, Patience.of(PATIENCE))


def _seconds(action: Callable[[], object]) -> float:
    """Of the process."""
    began = time.process_time()
    action()
    return time.process_time() - began


# ---------------------------------------------------------------- waiting

LAYER_SECONDS = 0.02
"""What a layer's forward takes; its backward takes twice as long."""


class _Elsewhere(torch.autograd.Function):
    """Takes time, as if it were computed on another device."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        time.sleep(LAYER_SECONDS)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        time.sleep(2 * LAYER_SECONDS)
        return gradient


class Layer(nn.Linear):
    """A layer that computes for as long as an accelerator would, without a processor."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Residual: through many layers gradients would become so small that their squares are denormal, which
        # processors compute ten times as slowly.
        result: torch.Tensor = x + _Elsewhere.apply(super().forward(x))  # type: ignore[no-untyped-call]
        return result


def waiting(where: str, layers: int, steps: int) -> list[report.Row]:
    """Medians over steps; the sides take turns, step by step."""
    weights = layers * WIDTH * WIDTH * 4
    # A tenth of weights, state and gradients, if an update fits into that.
    memory = None if where == "memory" else max(4 * weights // 10, 40 * MIB)
    sides: dict[str, list[tuple[float, float, float]]] = {"step()": [], "last_backward()": []}
    with (
        tempfile.TemporaryDirectory(prefix="zero-ps-") as folder,
        LocalCluster(1, data_dir=folder, memory=memory) as cluster,
        trainer.connect(cluster.addresses, job="waiting") as job,
    ):
        with job.init():
            model = nn.Sequential(*[Layer() for _ in range(layers)])
        # Nothing stays from one pass to the next: every layer comes from the server.
        trainer.offload(model, job, trainer.OffloadConfig(max_live_bytes=max(weights // 4, 4 * WIDTH * WIDTH * 4)))
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-4)
        first: list[float] = []
        # Of the torch's hooks it is the last one: the layer is whole.
        model[0].register_forward_pre_hook(lambda *_: first.append(time.perf_counter()))
        x = torch.randn(8, WIDTH)
        y = model(x)
        for number in range(2 * (steps + 2)):
            name = list(sides)[number % 2]
            loss = y.square().mean()
            began = time.perf_counter()
            with optimizer.last_backward() if name == "last_backward()" else nullcontext():
                loss.backward()
            ended = time.perf_counter()
            optimizer.step()
            optimizer.zero_grad()
            before = trainer.report(model).total_stalled_seconds
            y = model(x)
            stalled = trainer.report(model).total_stalled_seconds - before
            # The first of each side learns.
            if number >= 4:
                sides[name].append((first[-1] - ended, stalled, ended - began))
    rows = []
    plain = [statistics.median(values) for values in zip(*sides["step()"], strict=True)]
    for name, figures in sides.items():
        values = [statistics.median(each) for each in zip(*figures, strict=True)]
        case: dict[str, str | int | float] = {"state": where, "parameters_m": weights // 4 // 10**6, "updates": name}
        for what, value, reference in zip(
            ("backward's end to first layer", "the next forward waits", "backward"), values, plain, strict=True
        ):
            ratio = None if name == "step()" else value / reference
            rows.append(report.Row(what, value * 1e3, "ms", None if ratio is None else "step()", ratio, case=case))
    return rows


# ---------------------------------------------------------------- pulls


class Blocks(nn.Module):
    """Takes micro-batches one after the other, or layer by layer."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(width, width, bias=False), nn.Tanh()) for _ in range(layers)]
        )

    def forward(self, micro_batches: Sequence[torch.Tensor]) -> torch.Tensor:
        outputs = trainer.layer_by_layer(self.blocks, micro_batches)
        return torch.stack([output.square().mean() for output in reversed(outputs)]).sum()


def pulls(layers: int) -> list[report.Row]:
    """Bytes pulled and pushed in a step, in copies of the model, a quarter of which fits into the trainer."""
    width, rows = 256, []
    weights = layers * width * width * 4
    with LocalCluster(1) as cluster, trainer.connect(cluster.addresses, job="pulls") as job:
        model = trainer.offload(
            Blocks(layers, width),
            job,
            trainer.OffloadConfig(max_live_bytes=weights // 4, param_persistence_threshold=0),
        )
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=1e-3)
        for order in ("one after the other", "layer by layer"):
            for count in (1, 2, 4, 8):
                batches = [torch.randn(4, width) for _ in range(count)]
                for _ in range(4):
                    pulled, pushed = job.stats.bytes_pulled, job.stats.bytes_pushed
                    for part in [batches] if order == "layer by layer" else [[batch] for batch in batches]:
                        model(part).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                case: dict[str, str | int | float] = {"micro_batches": count, "order": order}
                rows += [
                    report.Row("pulled in a step", (job.stats.bytes_pulled - pulled) / weights, "models", case=case),
                    report.Row("pushed in a step", (job.stats.bytes_pushed - pushed) / weights, "models", case=case),
                ]
    return rows


if __name__ == "__main__":
    sys.exit(report.main(__doc__, run))
