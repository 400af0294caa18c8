"""A trainer of `tests.chaos`: trains until it is told where to stop, whatever happens to it."""

import faulthandler
import signal
import sys
import time
from pathlib import Path

import torch

import trainer
from tests.models import Residual, batch, loss_of, seeded
from tests.trainer.recovery.programs import join_process_group
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


def run(
    addresses: list[str],
    stop_file: str,
    found: str,
    links: list[str] | None,
    patience: float,
    elastic: bool = False,
    port: int = 0,
    secrets: str = "",
    staleness: int = 0,
    commit_every: int = 4,
) -> None:
    """port: for group mode, where the process group is formed; 0 for direct mode. secrets: a folder as `zero-ps certs`
    makes it. commit_every: steps."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    try:
        if port:
            _join_process_group(port)
        config = trainer.OffloadConfig(mode="group" if port else "direct", max_staleness=staleness)
        credentials = _credentials(Path(secrets)) if secrets else None
        with _connected(addresses, links, patience, elastic, credentials) as job:
            with job.init():
                model = seeded(Residual, seed=job.rank)
            trainer.offload(model, job, config)
            optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)
            if not job.complete:
                job.commit()
            say("ready", job.step)
            while job.step < _stop_at(stop_file):
                said, place = -1, (0, 0, 0)
                with job.recovering(
                    lambda step: say("rewound", step), on_lost=lambda error: say("lost", type(error).__name__)
                ):
                    step, rank, world_size = place = job.step, job.rank, job.world_size
                    loss = loss_of(model, batch(step).chunk(world_size)[rank])
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    say("step", *place, loss.item().hex())
                    said = step
                    if job.step % commit_every == 0:
                        job.commit({"step": job.step}, wait=job.step % (2 * commit_every) == 0)
                if job.step == place[0] + 1 != said + 1:
                    say("made", *place)
            with job.recovering():
                torch.save({"step": job.step, "params": gathered_values(model)}, found)
            say("done", job.step)
    except MENDABLE as error:
        say("gave up", f"{type(error).__name__}: {error}")
        sys.exit(RESTART)


def _join_process_group(port: int) -> None:
    try:
        join_process_group(port)
    except RuntimeError as error:
        # Another one was killed meanwhile.
        say("gave up", f"no process group: {error}")
        sys.exit(RESTART)


def _credentials(folder: Path) -> trainer.Credentials:
    token = (folder / "train.token").read_text().strip()
    return trainer.Credentials(ca=folder / "ca.crt", cert=folder / "client.crt", key=folder / "client.key", token=token)


def _connected(
    addresses: list[str],
    links: list[str] | None,
    patience: float,
    elastic: bool,
    credentials: trainer.Credentials | None,
) -> trainer.Job:
    end = time.monotonic() + patience
    while True:
        try:
            return trainer.connect(
                addresses,
                job="chaos",
                links=links,
                elastic=elastic,
                credentials=credentials,
                connect_timeout=patience,
                timeout=patience,
            )
        except MENDABLE:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def _stop_at(path: str) -> float:
    try:
        return int(Path(path).read_text())
    except (FileNotFoundError, ValueError):
        return float("inf")
