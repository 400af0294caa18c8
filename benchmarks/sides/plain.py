"""Plain torch, all in memory of one process: bf16 weights and gradients, fp32 masters under fused AdamW."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from benchmarks.plain import PlainTraining
from benchmarks.sides.phases import Phases
from benchmarks.sides.side import serve
from benchmarks.workload import LEARNING_RATE, Batches, Workload
from trainer.heap import used_bytes


class Plain:
    """Of several trainers' work it does all: their batches are one batch."""

    def __init__(self, work: Workload, batches: Batches) -> None:
        model = work.model()
        # Before they are rounded, as servers have them.
        masters = [nn.Parameter(weight.detach().clone()) for weight in model.parameters()]
        self._training = PlainTraining(model.to(torch.bfloat16), LEARNING_RATE, masters)
        self._batches = batches
        self._phases = Phases()
        self._ranks = int(work.option("ranks") or 1)
        self.activation_bytes = 0

    def step(self, index: int) -> float:
        parts = [self._batches.at(index, rank) for rank in range(self._ranks)]
        x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return self._training.step(x, y, self._phase).item()

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        before = used_bytes() or 0
        with self._phases(name):
            yield
        if name == "forward":
            self.activation_bytes = max(self.activation_bytes, (used_bytes() or 0) - before)

    def moved(self) -> dict[str, int]:
        return {}

    def spent(self) -> dict[str, float]:
        return self._phases.seconds


if __name__ == "__main__":
    serve(Plain)
