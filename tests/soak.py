"""Servers killed at random instants, over and over: `python -m tests.soak --kills 50`.

A trainer trains and commits, every other time without waiting, until a server is killed under it. Each time the
newest commits have to pass `verify`, the run goes on from no earlier commit than the last that was known to be
done, and every loss has to be that of an undisturbed run, bit for bit. Half of the kills are of servers whose memory
is limited. Then `tests.chaos` does worse.
"""

import argparse
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import trainer
from ps import LocalCluster
from ps.tools.verification import verify
from tests.chaos import VARIANTS, storm
from tests.models import Residual, seeded, train

JOB = "soak"
SERVERS = 2
LONGEST_SECONDS = 1.5
"""From when training goes on to the kill, at the most."""


class Undisturbed:
    """The same run in plain torch, as far as it is asked for."""

    def __init__(self, make: Callable[[], torch.nn.Module]) -> None:
        self.make = make
        self._model = seeded(make)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-3, fused=True)
        self._losses: list[float] = []

    def loss(self, step: int) -> float:
        while len(self._losses) <= step:
            self._losses += train(self._model, self._optimizer, [len(self._losses)])
        return self._losses[step]


@dataclass
class Outcome:
    """steps: that were made, those that were made again included. committed: the last known to be done, or -1."""

    kills: int = 0
    steps: int = 0
    committed: int = -1


def wide() -> torch.nn.Module:
    """Some megabytes on each server, in several chunks."""
    return Residual(vocabulary=1501, width=500, layers=1)


def deep() -> torch.nn.Module:
    """With optimizer state and gradients 27 MB on each server, in chunks of a megabyte at most."""
    return Residual(vocabulary=701, width=256, layers=6)


def soak(
    kills: int,
    seed: int,
    root: Path,
    *,
    disks: int = 1,
    memory: str | None = None,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Raises AssertionError for whatever is not as it has to be. memory: of each server; None for no limit."""
    instants = random.Random(seed)
    undisturbed, outcome = Undisturbed(deep if memory else wide), Outcome()
    roots = [root / f"disk-{disk}" for disk in range(disks)]
    with LocalCluster(SERVERS, data_dir=roots, memory=memory, keep=3, lease=5) as cluster:
        while outcome.kills < kills:
            victims = [instants.randrange(SERVERS)] if instants.random() < 0.7 else list(range(SERVERS))
            after = instants.uniform(0.0, LONGEST_SECONDS)
            began = outcome.steps
            resumed_at = _train_until_killed(cluster, undisturbed, outcome, victims, after)
            outcome.kills += len(victims)
            _check_commits(cluster, outcome)
            for victim in victims:
                cluster.restart(victim)
            say(
                f"kill {outcome.kills}/{kills}: servers {victims} {after:.2f} s into step {resumed_at} and "
                f"{outcome.steps - began} steps; the last commit known to be done is of step {outcome.committed}"
            )
        # What all of it led to.
        with trainer.connect(cluster.addresses, job=JOB) as job:
            assert job.step >= outcome.committed
            _steps(job, undisturbed, outcome, lambda: job.step < outcome.committed + 3)
    return outcome


def _train_until_killed(
    cluster: LocalCluster, undisturbed: Undisturbed, outcome: Outcome, victims: Sequence[int], after: float
) -> int:
    """Returns the step from which it went on."""
    ready = threading.Event()

    def kill() -> None:
        assert ready.wait(60)
        time.sleep(after)
        for victim in victims:
            cluster.kill(victim)

    killer = threading.Thread(target=kill)
    killer.start()
    resumed_at = -1
    try:
        with trainer.connect(cluster.addresses, job=JOB, connect_timeout=60) as job:
            resumed_at = job.step
            assert resumed_at >= outcome.committed, (resumed_at, outcome.committed)
            _steps(job, undisturbed, outcome, lambda: True, ready)
    except trainer.ZeroPsError as error:
        # What is lost with a server is said so; anything else is a fault.
        assert isinstance(error, trainer.ConnectError), error
    finally:
        ready.set()
        killer.join()
    return resumed_at


def _steps(
    job: trainer.Job,
    undisturbed: Undisturbed,
    outcome: Outcome,
    go_on: Callable[[], bool],
    ready: threading.Event | None = None,
) -> None:
    with job.init():
        built = seeded(undisturbed.make)
    trainer.offload(built, job)
    optimizer = trainer.RemoteOptimizer(built.parameters(), torch.optim.AdamW, lr=1e-3)
    pending: trainer.Commit | None = None
    if not job.complete:
        # A job of which nothing was committed cannot survive the loss of one of its servers.
        job.commit()
        outcome.committed = job.step
    if ready is not None:
        ready.set()
    while go_on():
        step = job.step
        (loss,) = train(built, optimizer, [step])
        assert loss == undisturbed.loss(step), f"step {step}: {loss!r}, undisturbed {undisturbed.loss(step)!r}"
        outcome.steps += 1
        if pending is not None and pending.done():
            pending.wait()
            outcome.committed = max(outcome.committed, pending.step)
            pending = None
        if job.step % 2 == 0:
            commit = job.commit({"step": job.step}, wait=job.step % 4 == 0)
            if commit.done():
                commit.wait()
                outcome.committed = max(outcome.committed, commit.step)
            else:
                pending = commit


def _check_commits(cluster: LocalCluster, outcome: Outcome) -> None:
    """With the dead dead, and the others running or not."""
    folders = [folder for disks in cluster.disks for folder in disks]
    report = verify(folders, job=JOB)
    assert report.ok, report.problems
    assert report.generations[0].key.step >= outcome.committed, (report.generations[0].key, outcome.committed)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=None, help="of the instants (default: one of its own)")
    parser.add_argument("--disks", type=int, default=2, help="data folders of each server (default: %(default)s)")
    parser.add_argument("--faults", type=int, default=100, help="of `tests.chaos` afterwards (default: %(default)s)")
    parser.add_argument("--memory", default="10MiB", help="of servers in the second half (default: %(default)s)")
    options = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
    print(f"soak: {options.kills} kills, --seed {seed}", flush=True)
    torch.set_num_threads(1)
    began = time.monotonic()
    done = steps = 0
    for kills, memory in ((options.kills // 2, None), (options.kills - options.kills // 2, options.memory)):
        print(f"soak: {kills} kills of servers with {memory or 'no limit'} of memory", flush=True)
        with tempfile.TemporaryDirectory(prefix="zero-ps-soak-") as root:
            outcome = soak(kills, seed, Path(root), disks=options.disks, memory=memory)
        done, steps = done + outcome.kills, steps + outcome.steps
    seconds = time.monotonic() - began
    print(f"soak: {done} kills and {steps} steps in {seconds:.0f} s, and all is as it has to be")
    if options.faults:
        print(f"soak: {options.faults} faults of every kind, to servers, trainers and what is between them", flush=True)
        storm(options.faults, seed, VARIANTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
