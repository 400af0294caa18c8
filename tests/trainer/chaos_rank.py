"""A trainer of `tests.chaos`: trains until it is told where to stop, whatever happens to it."""

import faulthandler
import os
import signal
import sys
import time
from pathlib import Path

import torch

import trainer
from tests.models import Residual, batch, loss_of, seeded
from tests.trainer.runs import gathered_values

RESTART = 75
"""Exit status for what a supervisor such as torchrun answers by starting the trainer again."""

MENDABLE = (
    trainer.ConnectError,
    trainer.TrainerLost,
    trainer.DeadlineExceeded,
    trainer.StepHalfDone,
    trainer.SessionLost,
)


def say(*words: object) -> None:
    print("chaos", *words, flush=True)


def run(addresses: list[str], stop_file: str, found: str, links: list[str] | None, patience: float) -> None:
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        with _connected(addresses, links, patience) as job:
            with job.init():
                model = seeded(Residual, seed=rank)
            trainer.offload(model, job)
            optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)
            if not job.complete:
                job.commit()
            say("ready", job.step)
            while job.step < _stop_at(stop_file):
                with job.recovering(
                    lambda step: say("rewound", step), on_lost=lambda error: say("lost", type(error).__name__)
                ):
                    step = job.step
                    loss = loss_of(model, batch(step).chunk(world_size)[rank])
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    say("step", step, loss.item().hex())
                    if job.step % 4 == 0:
                        job.commit({"step": job.step}, wait=job.step % 8 == 0)
            with job.recovering():
                torch.save({"step": job.step, "params": gathered_values(model)}, found)
            say("done", job.step)
    except MENDABLE as error:
        say("gave up", f"{type(error).__name__}: {error}")
        sys.exit(RESTART)


def _connected(addresses: list[str], links: list[str] | None, patience: float) -> trainer.Job:
    end = time.monotonic() + patience
    while True:
        try:
            return trainer.connect(addresses, job="chaos", links=links, connect_timeout=patience, timeout=patience)
        except MENDABLE:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def _stop_at(path: str) -> float:
    try:
        return int(Path(path).read_text())
    except (FileNotFoundError, ValueError):
        return float("inf")
