"""A trainer of zero-ps. The servers are processes of their own, which whoever starts it names."""

import os

import torch

import trainer
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

    def step(self, index: int) -> float:
        loss: torch.Tensor = self._model(*self._batches.at(index))
        with self._optimizer.last_backward():
            loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()

    def moved(self) -> dict[str, int]:
        return {"pulled": self._job.stats.bytes_pulled, "pushed": self._job.stats.bytes_pushed}


if __name__ == "__main__":
    serve(Offloaded)
