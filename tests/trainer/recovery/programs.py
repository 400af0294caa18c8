"""Trainers that recover, for the tests of recovery (see `tests.ranks`)."""

import gc
import os
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import trainer
from tests.models import Residual, batch, loss_of, seeded
from tests.trainer.runs import gathered_values
from trainer.offload import find
from trainer.transfer import Destination

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

    def __init__(
        self, world_sizes: Callable[[int], int] = lambda step: 1, make: Callable[[], nn.Module] = Residual
    ) -> None:
        self.model = seeded(make)
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
    notes: str,
    until: int,
    elastic: bool = False,
    announced: bool = False,
    wait: str = "",
    stall: int = -1,
    stall_seconds: float = 600.0,
    stall_until: str = "",
    grow: bool = False,
    pause: float = 0.05,
    port: int = 0,
    commit_at: int = 0,
) -> dict[str, Any]:
    """Trains and recovers, whatever happens, until the job has made so many steps.

    notes: a folder, in which a file named for RANK gets a line for what this trainer does.
    wait: before it connects, for a note with this name. stall: the step in which it hangs once, before it is made,
        for stall_seconds or until there is a note with the name stall_until.
    grow: not `until` ends it, but the third step with two trainers after there was one.
    port: for group mode, where the process group is formed; 0 for direct mode. There it stalls within a forward, or,
        where steps are announced, when a chunk has moved on.
    """
    note = Notes(Path(notes), os.environ["RANK"])
    rewinds: list[int] = []
    lost: list[str] = []
    losses: dict[int, float] = {}
    places: dict[int, tuple[int, int]] = {}
    note("started")
    if wait:
        Notes(Path(notes), wait).wait_for("go")
    if port:
        join_process_group(port)

    def hang() -> None:
        nonlocal stall
        stall = -1
        note("stalled")
        if stall_until:
            Notes(Path(notes), stall_until).wait_for("go")
        else:
            time.sleep(stall_seconds)

    with trainer.connect(addresses, job=job, elastic=elastic, timeout=60, connect_timeout=60) as connection:
        config = trainer.OffloadConfig(mode="group", param_persistence_threshold=0) if port else None
        model = trainer.offload(seeded(Residual), connection, config)
        optimizer = adamw(model)
        if port and not announced:
            model.blocks[0].register_forward_hook(lambda *_: hang() if connection.step == stall else None)
        if not connection.complete:
            connection.commit()
        joined_at = connection.step
        while connection.step < until:
            with connection.recovering(
                rewinds.append, on_lost=lambda error: lost.append(f"{type(error).__name__}: {error}")
            ):
                step, rank, size = connection.step, connection.rank, connection.world_size
                note(f"step {step} as {rank}/{size}")
                loss = loss_of(model, share(step, rank, size))
                with optimizer.last_backward() if announced else nullcontext():
                    loss.backward()
                if step == stall:
                    if port:
                        wait_for_an_update(model, connection)
                    hang()
                time.sleep(pause)
                optimizer.step()
                optimizer.zero_grad()
                if connection.step == commit_at:
                    connection.commit()
                losses[step], places[step] = loss.item(), (rank, size)
                if grow and size == 2 and (0 < joined_at == step or places.get(step - 1) == (0, 1)):
                    until = step + 3
        params = gathered_values(model)
        result = {
            "joined_at": joined_at,
            "losses": losses,
            "places": places,
            "rewinds": rewinds,
            "lost": lost,
            "params": params,
        }
    note("ended")
    return result


def end_without_close(addresses: list[str], job: str) -> None:
    """Trains a step in a function that forgets about the job."""

    def main() -> None:
        connection = trainer.connect(addresses, job=job)
        model = trainer.offload(seeded(Residual), connection)
        optimizer = adamw(model)
        loss_of(model, batch(0)).backward()
        optimizer.step()

    main()
    gc.collect()


def join_process_group(port: int) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )


def wait_for_an_update(model: nn.Module, job: trainer.Job) -> None:
    """Returns when a chunk of an announced step is a version further."""
    job.transfer.flush()
    state = find(model).states[-1]  # type: ignore[union-attr]
    data = torch.empty(state.nbytes, dtype=torch.uint8)
    job.transfer.pull([Destination(state.remote, data, state.dtype)], job.step + 1).wait()


def run(rank: int, world_size: int, result: str, arguments: dict[str, Any]) -> None:
    """`steps` in a process of its own; what it returns, or the error, is left in a file."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    try:
        torch.save(steps(**arguments), result)
    except BaseException:
        Path(f"{result}.error").write_text(traceback.format_exc())
        raise


class Notes:
    """What one process tells another, line by line in a file."""

    def __init__(self, folder: Path, name: str) -> None:
        self._path = folder / f"notes-{name}"

    def __call__(self, text: str) -> None:
        with self._path.open("a") as file:
            file.write(f"{text}\n")

    def wait_for(self, text: str, seconds: float = 240.0) -> None:
        end = time.monotonic() + seconds
        while not self._path.exists() or f"\n{text}" not in f"\n{self._path.read_text()}":
            assert time.monotonic() < end, f"{self._path.name} never said {text!r}"
            time.sleep(0.02)
