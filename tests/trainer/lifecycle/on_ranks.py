"""What trainer processes of the lifecycle tests do (see `tests.ranks`)."""

import os
from typing import Any

import torch
from torch import nn

import trainer
from tests.models import seeded
from tests.trainer.lifecycle.comparing import step
from tests.trainer.runs import gathered_values


class Branches(nn.Module):
    """Runs another expert on each rank and step; one of them on no rank at all."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.experts = nn.ModuleList([nn.Linear(5, 5) for _ in range(4)])
        self.chosen: list[int] = []

    def forward(self, x: torch.Tensor, choice: int) -> torch.Tensor:
        self.chosen.append(choice)
        x = self.first(x)
        for index in range(choice + 1):
            x = torch.tanh(self.experts[index](x))
        return x


def _loss(model: nn.Module, rank: int, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * rank + number)
    return model(torch.randn(3, 5, generator=generator), (number + 2 * rank) % 3).square().mean()


def different_modules(addresses: list[str], job: str, steps: int) -> dict[str, Any]:
    """Trains with control flow of this rank's own."""
    rank = int(os.environ["RANK"])
    with trainer.connect(addresses, job=job) as connection:
        model = trainer.offload(seeded(Branches), connection, trainer.OffloadConfig(param_persistence_threshold=0))
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)
        for number in range(steps):
            _loss(model, rank, number).backward()
            step(optimizer)
        return {"chosen": model.chosen, "params": gathered_values(model)}


def different_modules_in_one_process(world_size: int, steps: int) -> dict[str, torch.Tensor]:
    """The same in plain torch: the mean of all ranks' gradients, zero for a rank that has none."""
    model = seeded(Branches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for number in range(steps):
        gradients = []
        for rank in range(world_size):
            _loss(model, rank, number).backward()
            gradients.append([p.grad for p in model.parameters()])
            model.zero_grad()
        for param, of_ranks in zip(model.parameters(), zip(*gradients, strict=True), strict=True):
            present = [g for g in of_ranks if g is not None]
            if present:
                total = present[0]
                for gradient in present[1:]:
                    total = total + gradient
                param.grad = total / world_size
        step(optimizer)
    return {name: param.detach() for name, param in model.named_parameters()}


def edits(addresses: list[str], job: str) -> dict[str, Any]:
    """Rank 0 changes parameters inside `gathered(modify=True)`; every rank sees them and trains on."""
    rank = int(os.environ["RANK"])
    with trainer.connect(addresses, job=job) as connection:
        model = trainer.offload(seeded(Branches, seed=rank), connection)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        with trainer.gathered(model.parameters(), modify=True), torch.no_grad():
            model.first.weight.fill_(1.0 + rank)
            if rank == 1:
                model.first.bias.fill_(9.0)
        after_edit = gathered_values(model)
        error = ""
        try:
            with trainer.gathered(model.first.weight), torch.no_grad():
                model.first.weight.mul_(2)
        except trainer.ModifiedParameterError as raised:
            error = str(raised)
        state = {name: torch.full(tuple(p.shape), 0.25) for name, p in model.named_parameters()}
        before_load = gathered_values(model)
        # A rank that still reads would see what rank 0 loads.
        connection.barrier("read")
        model.load_state_dict(state if rank == 0 else {k: v * 3 for k, v in state.items()})
        after_load = gathered_values(model)
        _loss(model, rank, 0).backward()
        step(optimizer)
        return {
            "after_edit": after_edit,
            "error": error,
            "before_load": before_load,
            "after_load": after_load,
            "params": gathered_values(model),
        }
