"""What trainer processes of the tests do (see `tests.ranks`)."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

import trainer
from tests.models import Residual, batch, loss_of, seeded


def adamw(params: Any) -> trainer.RemoteOptimizer:
    return trainer.RemoteOptimizer(params, torch.optim.AdamW, lr=1e-2)


def gathered_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters, taken one by one: together they may be more than may be here."""
    values = {}
    for name, param in model.named_parameters():
        with trainer.gathered(param):
            values[name] = param.detach().clone()
    return values


def steps_of_adamw(
    addresses: list[str], job: str, steps: int, commit_at: int | None = None, stay: bool = False
) -> dict[str, Any]:
    """Trains on this rank's share of each batch, from where the job is."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with trainer.connect(addresses, job=job) as connection:
        with connection.init():
            model = seeded(Residual, seed=rank)
        trainer.offload(model, connection)
        optimizer = adamw(model.parameters())
        losses = []
        started_at = connection.step
        while connection.step < started_at + steps:
            tokens = batch(connection.step).chunk(world_size)[rank]
            loss = loss_of(model, tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if connection.step == commit_at:
                connection.commit({"seen": connection.step})
                if stay:
                    print("committed", flush=True)
        return {
            "started_at": started_at,
            "metadata": connection.metadata,
            "losses": losses,
            "params": gathered_values(model),
        }


def wrong_world_size(addresses: list[str], job: str, sizes: list[int]) -> str:
    """Connects with a world size of this rank's own; the error's text."""
    rank = int(os.environ["RANK"])
    try:
        with trainer.connect(addresses, job=job, rank=rank, world_size=sizes[rank], connect_timeout=20):
            return "connected"
    except trainer.ZeroPsError as error:
        return str(error)


def peak_rss_bytes() -> int:
    """The most resident memory that this process has had. Not `ru_maxrss`, which begins at the parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


def own_bytes() -> int:
    """Resident memory of this process that is not shared, as that which servers lend."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssFile:")))


def live_bytes(model: nn.Module) -> int:
    """Bytes of parameters that are here."""
    return sum(param.untyped_storage().nbytes() for param in model.parameters())


class Deep(nn.Module):
    """Many equal layers, each of which is a small part of the model."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in range(layers)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def peak_memory(addresses: list[str], job: str, layers: int, width: int) -> dict[str, int]:
    """Builds, trains and commits a model; what this process took for it at the peak, in bytes.

    In training as seen from within each layer's forward and backward, without what servers lend.
    """
    with trainer.connect(addresses, job=job) as connection:
        # Whatever torch allocates once, for any model, is not the model's.
        small = nn.Linear(8, 8)
        small(torch.randn(2, 8)).sum().backward()
        before = peak_rss_bytes()
        with connection.init():
            model = Deep(layers, width)
        limit = 2 * width * width * 4 + (64 << 10)
        trainer.offload(model, connection, trainer.OffloadConfig(max_live_bytes=limit))
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        # Until here nothing was read from the servers.
        own = [peak_rss_bytes()]
        live: list[int] = []

        def look(*_: object) -> None:
            live.append(live_bytes(model))
            own.append(own_bytes())

        for layer in model.layers:
            # Where the layer is whole: after the hooks of the package, and before the gradient is sent.
            layer.register_forward_pre_hook(look)
            layer.weight.register_hook(look)
        for _ in range(2):
            model(torch.randn(4, width)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        connection.commit()
        own.append(own_bytes())
        return {
            "model": sum(param.numel() * 4 for param in model.parameters()),
            "largest": width * width * 4,
            "beyond": max(own) - before,
            "limit": limit,
            "live": max(live),
            "reported": trainer.report(model).peak_live_bytes,
        }


def clipped_adamw(
    addresses: list[str], job: str, layers: int, width: int, commits: list[int], dtype: str | None = None
) -> dict[str, Any]:
    """Trains from where the job is to the last of the steps to commit: two micro-batches each, clipped gradients."""
    param_dtype = None if dtype is None else getattr(torch, dtype)
    rank = int(os.environ["RANK"])
    with trainer.connect(addresses, job=job) as connection:
        with connection.init():
            model = seeded(lambda: Deep(layers, width))
        config = trainer.OffloadConfig(param_dtype=param_dtype)
        trainer.offload(model, connection, config)
        optimizer = adamw(model.parameters())
        started_at, losses = connection.step, []
        while connection.step < commits[-1]:
            for part in range(2):
                generator = torch.Generator().manual_seed(100 * connection.step + 10 * rank + part)
                x = torch.randn(4, width, generator=generator).to(param_dtype or torch.float32)
                loss = model(x).float().pow(2).mean()
                loss.backward()
                losses.append(loss.item())
            trainer.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
            if connection.step in commits:
                connection.commit()
        return {"started_at": started_at, "losses": losses, "params": gathered_values(model)}


def delayed_steps(addresses: list[str], job: str, steps: int, staleness: int) -> dict[str, Any]:
    """Trains with `max_staleness` on this rank's share of each batch."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with trainer.connect(addresses, job=job, timeout=60) as connection:
        config = trainer.OffloadConfig(max_staleness=staleness, param_persistence_threshold=50)
        model = trainer.offload(seeded(Residual), connection, config)
        optimizer = adamw(model.parameters())
        losses = []
        for step in range(steps):
            loss = loss_of(model, batch(step).chunk(world_size)[rank])
            loss.backward()
            trainer.clip_grad_norm_(model.parameters(), 1e9)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return {"losses": losses, "params": gathered_values(model)}
