"""A trainer of zero-ps. The servers are processes of their own, which whoever starts it names."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

import trainer
from benchmarks.sides.phases import Phases
from benchmarks.sides.side import serve
from benchmarks.workload import LEARNING_RATE, Batches, Workload


class Offloaded:
    """options: servers, their addresses; max_live_bytes, if limited."""

    def __init__(self, work: Workload, batches: Batches) -> None:
        limit = work.option("max_live_bytes")
        self._job = trainer.connect(
            work.option("servers") or "", job=f"step-{os.getppid()}", rank=work.rank, world_size=work.world_size
        )
        with self._job.init():
            self._model = work.model()
        config = trainer.OffloadConfig(param_dtype=torch.bfloat16, max_live_bytes=None if limit is None else int(limit))
        trainer.offload(self._model, self._job, config)
        self._optimizer = trainer.RemoteOptimizer(self._model.parameters(), torch.optim.AdamW, lr=LEARNING_RATE)
        self._batches = batches
        self._phases = Phases()

    def step(self, index: int) -> float:
        x, y = self._batches.at(index)
        with self._phase("forward"):
            loss: torch.Tensor = self._model(x, y)
        with self._phase("backward"), self._optimizer.last_backward(zero_grad=True):
            torch.autograd.backward(loss)
        with self._phase("update"):
            self._optimizer.step()
            self._optimizer.zero_grad()
        return loss.item()

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        before = trainer.report(self._model).total_stalled_seconds
        with self._phases(name):
            yield
        self._phases.seconds[f"{name} stalled"] += trainer.report(self._model).total_stalled_seconds - before

    def moved(self) -> dict[str, int]:
        return {"pulled": self._job.stats.bytes_pulled, "pushed": self._job.stats.bytes_pushed}

    def spent(self) -> dict[str, float]:
        return self._phases.seconds


if __name__ == "__main__":
    serve(Offloaded)
