"""Models that tests train, and how they train them."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width, bias=False)
        self.gain = nn.Parameter(torch.tensor(0.9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gain * self.down(F.gelu(self.up(self.norm(x))))


class Residual(nn.Module):
    """Embedding, blocks and a head, with a 0-d, an empty and an odd-sized parameter among them."""

    def __init__(self, *, vocabulary: int = 101, width: int = 24, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(layers)])
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.head = nn.Linear(width, vocabulary)
        self.apply(self._initialise)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.05)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batch(step: int, *, rows: int = 4, length: int = 9, vocabulary: int = 101) -> torch.Tensor:
    """Tokens of shape (rows, length), a function of the step."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(vocabulary, (rows, length), generator=generator)


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Next-token cross entropy."""
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Sequence[int],
    make_batch: Callable[[int], torch.Tensor] = batch,
) -> list[float]:
    """Plain training; the losses."""
    losses = []
    for step in steps:
        loss = loss_of(model, make_batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The model that `make` builds after seeding torch."""
    torch.manual_seed(seed)
    return make()
