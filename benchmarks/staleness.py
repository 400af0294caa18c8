"""What `max_staleness` costs, and what it brings.

The cost: the GPT of `zero-ps demo` at half its width, on Python's own sources, with servers that put every
update off as long as `max_staleness=k` permits, so that each step computes with weights that lack exactly the
last k updates. Real servers are at most that late. The loss at the end is of text that training does not see,
with the weights after all updates. `benchmarks.plots` draws the losses of training.

What it brings: step time where state is on disk and updates take longer than what of them a forward and a
backward hide, with k = 0 and 1, which take turns.
"""

import math
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack

import torch
from torch import nn

import trainer
from benchmarks import report
from benchmarks.optimizer import Layer
from benchmarks.storage import WIDTH
from ps import LocalCluster
from trainer.app.data import Corpus, standard_library
from trainer.app.gpt import GPT, GPTConfig

STALENESS = (0, 1, 2, 4)
MODEL = GPTConfig(layers=4, width=256, heads=8, context=64)
BATCH, RATE, WARMUP = 8, 5e-4, 10
HELD_OUT_BATCHES = 16
SMOOTHED = 10
"""Steps that a row of the loss while training is the mean of."""

_STEPS_A_TURN = 8

Losses = dict[int, tuple[list[float], float]]
"""By k: that of each step, and of what was held out at the end; in nats per byte."""


def run(quick: bool) -> list[report.Row]:
    """The rows of losses with updates that are late, and of what a step gains by it."""
    torch.set_num_threads(1)
    return converged(losses(20 if quick else 120, STALENESS[:2] if quick else STALENESS)) + gained(
        layers=6 if quick else 24, steps=2 if quick else 12
    )


def losses(steps: int, staleness: tuple[int, ...] = STALENESS) -> Losses:
    """Of a training run with each max_staleness: the loss of every step, and that of held-out text at the end."""
    corpus = Corpus.read(standard_library())
    found: Losses = {}
    with LocalCluster(2, flags=["--late-updates"]) as cluster:
        for k in staleness:
            with trainer.connect(cluster.addresses, job=f"staleness-{k}") as job:
                found[k] = _trained(job, k, steps, corpus)
                print(
                    f"max_staleness={k}: {found[k][1]:.4f} nats per byte after {steps} steps",
                    file=sys.stderr,
                    flush=True,
                )
    return found


def _trained(job: trainer.Job, staleness: int, steps: int, corpus: Corpus) -> tuple[list[float], float]:
    torch.manual_seed(0)
    with job.init():
        model = GPT(MODEL)
    trainer.offload(model, job, trainer.OffloadConfig(max_staleness=staleness))
    optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=RATE)

    def loss(seed: int, step: int) -> torch.Tensor:
        found: torch.Tensor = model(*corpus.batch(seed=seed, step=step, rank=0, size=BATCH, context=MODEL.context))
        return found

    each = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, steps)
        value = loss(0, step)
        torch.autograd.backward(value)
        optimizer.step()
        optimizer.zero_grad()
        each.append(value.item())
    with torch.no_grad():
        return each, statistics.mean(loss(1, step).item() for step in range(HELD_OUT_BATCHES))


def _rate(step: int, steps: int) -> float:
    """As the training application has it."""
    if step < WARMUP:
        return RATE * (step + 1) / WARMUP
    progress = (step - WARMUP) / max(1, steps - WARMUP)
    return RATE * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def converged(found: Losses) -> list[report.Row]:
    """The rows of what `losses` found."""
    rows = []
    for k, (each, _) in found.items():
        for end in range(SMOOTHED, len(each) + 1, SMOOTHED):
            loss = statistics.mean(each[end - SMOOTHED : end])
            rows.append(report.Row("training loss", loss, "nats/byte", case={"max_staleness": k, "step": end}))
    for k, (each, last) in found.items():
        ratio = None if k == 0 or 0 not in found else last / found[0][1]
        against = None if ratio is None else "max_staleness 0"
        case: dict[str, str | int | float] = {"max_staleness": k, "steps": len(each)}
        rows.append(report.Row("loss at the end", last, "nats/byte", against, ratio, case=case))
    return rows


def gained(layers: int, steps: int) -> list[report.Row]:
    """Medians; sides take turns."""
    weights = layers * WIDTH * WIDTH * 4
    seconds: dict[int, list[float]] = {0: [], 1: []}
    with ExitStack() as stack:
        sides = {}
        for k in seconds:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="zero-ps-"))
            memory = max(4 * weights // 10, 40 << 20)
            cluster = stack.enter_context(LocalCluster(1, data_dir=folder, memory=memory))
            job = stack.enter_context(trainer.connect(cluster.addresses, job="gain"))
            with job.init():
                model = nn.Sequential(*[Layer() for _ in range(layers)])
            config = trainer.OffloadConfig(max_staleness=k, max_live_bytes=max(weights // 4, 4 * WIDTH * WIDTH * 4))
            trainer.offload(model, job, config)
            sides[k] = model, trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-4)
        x = torch.randn(8, WIDTH)
        for number in range(steps + 2):
            for k, (model, optimizer) in sides.items():
                began = time.perf_counter()
                # Each side has the machine for itself: what it leaves to do it does within its own time.
                for _ in range(_STEPS_A_TURN):
                    model(x).square().mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                optimizer.state_for(list(model.parameters())[-1])
                if number >= 2:
                    seconds[k].append((time.perf_counter() - began) / _STEPS_A_TURN)
    rows = []
    for k, values in seconds.items():
        ratio = None if k == 0 else statistics.median(values) / statistics.median(seconds[0])
        case: dict[str, str | int | float] = {
            "max_staleness": k,
            "state": "disk",
            "parameters_m": weights // 4 // 10**6,
        }
        against = None if ratio is None else "max_staleness 0"
        rows.append(report.Row("step", statistics.median(values) * 1e3, "ms", against, ratio, case=case))
    return rows


if __name__ == "__main__":
    sys.exit(report.main(__doc__, run))
