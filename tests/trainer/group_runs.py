"""What trainer processes of the tests of group mode do (see `tests.ranks`)."""

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import trainer
from tests.models import Residual, batch, loss_of, seeded
from tests.trainer.runs import adamw, gathered_values
from trainer.offload import find
from trainer.transfer import Destination

LIMITS = {"param_persistence_threshold": 0, "max_live_bytes": 60_000}
"""Room for little more than the largest module, so that parameters go and come back."""


class Chunked(nn.Module):
    """With a parameter of several chunks, so that there are chunks of which a rank has no part."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(1025, 4096)
        self.last = nn.Linear(4096, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.wide(x)))


class Branching(nn.Module):
    """Takes one way or the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.ways = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: torch.Tensor, way: int) -> torch.Tensor:
        return self.ways[way](self.first(x))


def join(store: str) -> tuple[int, int]:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    return rank, world_size


def train(
    addresses: list[str],
    job: str,
    store: str,
    mode: str = "group",
    steps: int = 3,
    micro_batches: int = 1,
    param_dtype: str | None = None,
    limited: bool = False,
) -> dict[str, Any]:
    """Trains on this rank's share of each batch."""
    rank, world_size = join(store)
    dtype = None if param_dtype is None else getattr(torch, param_dtype)
    config = trainer.OffloadConfig(mode=mode, param_dtype=dtype, **(LIMITS if limited else {}))
    with trainer.connect(addresses, job=job) as connection:
        model = seeded(Residual)
        trainer.offload(model, connection, config)
        optimizer = adamw(model.parameters())
        losses = []
        before = connection.stats.bytes_pulled, connection.stats.bytes_pushed
        for step in range(steps):
            for micro_batch in range(micro_batches):
                tokens = batch(step * micro_batches + micro_batch, rows=2 * world_size).chunk(world_size)[rank]
                loss = loss_of(model, tokens)
                loss.backward()
                losses.append(loss.item())
            trainer.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        moved = connection.stats.bytes_pulled - before[0], connection.stats.bytes_pushed - before[1]
        views = []
        if rank == 0:
            # One rank alone looks at a parameter, which stays for as long as it holds the view.
            with trainer.gathered(model.head.weight):
                views.append(model.head.weight.detach())
        loss_of(model, batch(99)).backward()
        views.clear()
        report = trainer.report(model)
        return {
            "losses": losses,
            "params": gathered_values(model),
            "moved": moved,
            "mode": report.mode,
            "peak": report.peak_live_bytes,
        }


def train_in_a_part_of_the_world(addresses: list[str], job: str, store: str, mode: str) -> dict[str, Any]:
    """Two data-parallel groups of two, each with parameters and a job of its own; one is given as a mesh."""
    join(store)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    data, shard = mesh["dp"], mesh["tp"].get_local_rank()
    rank, world_size = data.get_local_rank(), data.size()
    config = trainer.OffloadConfig(
        mode=mode, process_group=data if shard == 0 else data.get_group(), param_persistence_threshold=0
    )
    with trainer.connect(
        addresses, job=f"{job}-{shard}", rank=rank, world_size=world_size, links=["grpc"]
    ) as connection:
        model = seeded(lambda: Residual(width=16 + 8 * shard))
        trainer.offload(model, connection, config)
        optimizer = adamw(model.parameters())
        losses = []
        for step in range(3):
            loss = loss_of(model, batch(step, rows=2 * world_size).chunk(world_size)[rank])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return {"losses": losses, "params": gathered_values(model), "mode": trainer.report(model).mode}


def give_a_group_that_is_not_the_jobs(addresses: list[str], job: str, store: str) -> list[str]:
    """The errors, for a job of two: each gives the group of the other one, one of its own, and what is no group."""
    rank, _ = join(store)
    groups = [dist.new_group([0]), dist.new_group([1])]
    errors = []
    with trainer.connect(addresses, job=job, timeout=20) as connection:
        for group in (groups[1 - rank], groups[rank], "dp"):
            config = trainer.OffloadConfig(mode="group", process_group=group)
            try:
                trainer.offload(seeded(Residual), connection, config)
                errors.append("no error")
            except trainer.ZeroPsError as error:
                errors.append(f"{type(error).__name__}: {error}")
    return errors


def take_different_ways(addresses: list[str], job: str, store: str) -> str:
    rank, _ = join(store)
    with trainer.connect(addresses, job=job, timeout=20) as connection:
        model = seeded(Branching)
        trainer.offload(model, connection, trainer.OffloadConfig(mode="group", param_persistence_threshold=0))
        optimizer = adamw(model.parameters())
        try:
            model(torch.ones(1, 8), rank).sum().backward()
            optimizer.step()
            return "no error"
        except trainer.ZeroPsError as error:
            return f"{type(error).__name__}: {error}"


def choose(
    addresses: list[str], job: str, store: str, modes: Sequence[str], world: bool = True, link: str = "grpc"
) -> str:
    """The mode that comes of what the ranks wish, or the error."""
    rank = int(os.environ["RANK"])
    if world:
        join(store)
    with trainer.connect(addresses, job=job, timeout=20, links=[link]) as connection:
        model = seeded(Residual)
        try:
            trainer.offload(model, connection, trainer.OffloadConfig(mode=modes[rank]))
            return trainer.report(model).mode
        except trainer.ZeroPsError as error:
            return f"{type(error).__name__}: {error}"


def look_and_load(addresses: list[str], job: str, store: str, mode: str) -> dict[str, Any]:
    """Averages of weights, and state dicts of model and optimizer, between steps; some by one rank alone."""
    rank, world_size = join(store)
    with trainer.connect(addresses, job=job, timeout=40) as connection:
        model = trainer.offload(seeded(Residual), connection, trainer.OffloadConfig(mode=mode, **LIMITS))
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2, ema_decay=0.5)
        found: dict[str, Any] = {"losses": [], "averaged": []}

        def step(number: int) -> None:
            loss = loss_of(model, batch(number, rows=2 * world_size).chunk(world_size)[rank])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found["losses"].append(loss.item())

        for number in range(3):
            step(number)
            with trainer.ema_weights(model), torch.no_grad():
                found["averaged"].append(loss_of(model, batch(99)).item())
                if number == 1:
                    found["average"] = gathered_values(model)
        if rank == 1:
            # What one rank looks at alone.
            with trainer.gathered(model.head, ema=True):
                found["head"] = model.head.weight.detach().clone()
            found["state_for"] = optimizer.state_for(model.head.weight)
            found["alone"] = optimizer.state_dict()["state"]
        step(3)
        weights = gathered_values(model)
        state = optimizer.state_dict()
        step(4)
        # Back to before that step.
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        step(4)
        found["weights"], found["state"] = gathered_values(model), optimizer.state_dict()["state"]
        return found


def announce(addresses: list[str], job: str, store: str, early: bool) -> dict[str, Any]:
    """Trains with or without `last_backward` for every step; what was updated before the last step was asked for."""
    rank, world_size = join(store)
    with trainer.connect(addresses, job=job, timeout=40) as connection:
        model = trainer.offload(
            seeded(Chunked), connection, trainer.OffloadConfig(mode="group", param_persistence_threshold=0)
        )
        optimizer = adamw(model.parameters())
        updated = []
        for step in range(3):
            x = torch.randn(4, 1025, generator=torch.Generator().manual_seed(world_size * step + rank))
            loss = model(x).square().mean()
            with optimizer.last_backward() if early else contextlib.nullcontext():
                loss.backward()
            if step == 2 and early:
                connection.transfer.flush()
                for state in find(model).states:
                    data = torch.empty(state.nbytes, dtype=torch.uint8)
                    connection.transfer.pull([Destination(state.remote, data, state.dtype)], step + 1).wait()
                    updated.append(state.name)
            optimizer.step()
            optimizer.zero_grad()
        return {"updated": updated, "params": gathered_values(model)}
