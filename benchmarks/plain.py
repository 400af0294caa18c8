"""Training in plain torch with the arithmetic that servers do."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn


class PlainTraining:
    """All in memory: bf16 weights and gradients, and fp32 masters under torch's fused AdamW.

    model: in bf16. masters: what its parameters begin with; None for what they are.
    """

    def __init__(self, model: nn.Module, lr: float, masters: Sequence[nn.Parameter] | None = None) -> None:
        self._model = model
        self._weights = list(model.parameters())
        self._masters = masters or [nn.Parameter(weight.detach().float()) for weight in self._weights]
        self._optimizer = torch.optim.AdamW(self._masters, lr=lr, fused=True)

    def step(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        phase: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
    ) -> torch.Tensor:
        """The loss. phase: entered for each part of the step, with its name."""
        with phase("forward"):
            loss: torch.Tensor = self._model(x, y)
        with phase("backward"):
            torch.autograd.backward(loss)
        with phase("update"):
            self._update()
        return loss

    def _update(self) -> None:
        for weight, master in zip(self._weights, self._masters, strict=True):
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            for weight, master in zip(self._weights, self._masters, strict=True):
                weight.copy_(master)
