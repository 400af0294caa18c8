"""Plain torch, all in memory of one process: bf16 weights and gradients, fp32 masters under fused AdamW."""

import torch
from torch import nn

from benchmarks.sides.side import serve
from benchmarks.workload import LEARNING_RATE, Batches, Workload


class Plain:
    """Of several trainers' work it does all: their batches are one batch."""

    def __init__(self, work: Workload, batches: Batches) -> None:
        model = work.model()
        self._masters = [nn.Parameter(weight.detach().clone()) for weight in model.parameters()]
        self._model = model.to(torch.bfloat16)
        self._weights = list(self._model.parameters())
        self._optimizer = torch.optim.AdamW(self._masters, lr=LEARNING_RATE, fused=True)
        self._batches = batches
        self._ranks = int(work.option("ranks") or 1)

    def step(self, index: int) -> float:
        parts = [self._batches.at(index, rank) for rank in range(self._ranks)]
        x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        loss: torch.Tensor = self._model(x, y)
        loss.backward()
        for weight, master in zip(self._weights, self._masters, strict=True):
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            for weight, master in zip(self._weights, self._masters, strict=True):
                weight.copy_(master)
        return loss.item()

    def moved(self) -> dict[str, int]:
        return {}


if __name__ == "__main__":
    serve(Plain)
