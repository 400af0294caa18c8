"""Trainers that recover, for the tests of recovery (see `tests.ranks`)."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import trainer
from tests.models import Residual, batch, loss_of, seeded
from tests.trainer.runs import gathered_values

LR = 1e-2


def adamw(model: nn.Module) -> trainer.RemoteOptimizer:
    return trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=LR)


def share(step: int, rank: int, world_size: int) -> torch.Tensor:
    """This rank's rows of a step's batch of 4."""
    return batch(step).chunk(world_size)[rank]


class Plain:
    """The same training in plain torch, with a number of trainers for each step.

    losses: by step, of each rank.
    """

    def __init__(self, world_sizes: Callable[[int], int] = lambda step: 1) -> None:
        self.model = seeded(Residual)
        self.losses: list[list[float]] = []
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, fused=True)
        self._world_sizes = world_sizes

    def train_to(self, steps: int) -> "Plain":
        while len(self.losses) < steps:
            step = len(self.losses)
            size = self._world_sizes(step)
            self.losses.append([])
            total: dict[nn.Parameter, torch.Tensor] = {}
            for rank in range(size):
                loss = loss_of(self.model, share(step, rank, size))
                loss.backward()
                self.losses[-1].append(loss.item())
                for param in self.model.parameters():
                    if param.grad is not None:
                        # As servers do: fp32, in the order of ranks.
                        total[param] = total[param] + param.grad if param in total else param.grad
                        param.grad = None
            for param, gradient in total.items():
                param.grad = gradient if size == 1 else gradient / size
            self._optimizer.step()
            self._optimizer.zero_grad()
        return self

    def check(self, params: dict[str, torch.Tensor]) -> None:
        for name, param in self.model.named_parameters():
            assert torch.equal(params[name], param), name


def steps(
    addresses: list[str],
    job: str,
    until: int,
    commit_at: list[int] | None = None,
    pause: float = 0.0,
    elastic: bool = False,
    announced: bool = False,
    notes: str | None = None,
    timeout: float = 60.0,
) -> dict[str, Any]:
    """Trains and recovers, whatever happens, until the job has made so many steps.

    notes: a file that gets a line for each step that this trainer has made, and for each that it begins.
    """
    rank = int(os.environ["RANK"])
    note = _Notes(notes, rank)
    losses: dict[int, float] = {}
    rewinds: list[int] = []
    lost: list[str] = []
    sizes: dict[int, int] = {}
    with trainer.connect(addresses, job=job, elastic=elastic, timeout=timeout, connect_timeout=60) as connection:
        joined_at = connection.step
        model = trainer.offload(seeded(Residual), connection)
        optimizer = adamw(model)
        if not connection.complete:
            connection.commit()
        while connection.step < until:
            with connection.recovering(
                on_rewind=rewinds.append, on_lost=lambda error: lost.append(f"{type(error).__name__}: {error}")
            ):
                step, size = connection.step, connection.world_size
                note(f"begin {step} {connection.rank}/{size}")
                loss = loss_of(model, share(step, connection.rank, size))
                if announced:
                    with optimizer.last_backward():
                        loss.backward()
                else:
                    loss.backward()
                time.sleep(pause)
                optimizer.step()
                optimizer.zero_grad()
                losses[step], sizes[step] = loss.item(), size
                if connection.step in (commit_at or ()):
                    connection.commit()
                note(f"made {step}")
        params = gathered_values(model)
        connection.barrier("the end")
        return {
            "rank": connection.rank,
            "world_size": connection.world_size,
            "joined_at": joined_at,
            "losses": losses,
            "sizes": sizes,
            "rewinds": rewinds,
            "lost": lost,
            "params": params,
        }


class _Notes:
    def __init__(self, path: str | None, rank: int) -> None:
        self._file = None if path is None else (Path(path) / f"{rank}-{os.getpid()}").open("a")

    def __call__(self, text: str) -> None:
        if self._file is not None:
            self._file.write(f"{text}\n")
            self._file.flush()
