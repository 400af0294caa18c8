"""`zero-ps demo`: two servers, two trainers and one real training run on this machine.

Only what a person could do by hand in four terminals: servers from `LocalCluster`, trainers as
`python -m trainer` with the environment that torchrun would give them.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ps.arguments import ArgumentParser
from ps.cluster import LocalCluster
from ps.demo_folder import DemoError, Paths, claimed
from ps.demo_report import conclude, server_status
from ps.store import JobStore, StoreError

JOB = "demo"
STEPS = 120
"""Steps of one run: on two cores about two minutes, and enough for a loss under 2.6."""

STOP_SECONDS = 30.0
"""How long trainers may take to finish their step and commit after Ctrl-C."""


@dataclass(frozen=True)
class Demo:
    """The flags of `zero-ps demo`. `servers` is None for as many as the folder was made with, or two."""

    out: Path
    fresh: bool
    steps: int
    servers: int | None
    trainers: int
    train: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo with these flags: 0 when done, 1 when a process failed, 2 when it could not begin, 130 after
    Ctrl-C. Nothing that it started is left running."""
    flags = _parser().parse_args(arguments)
    try:
        return _run(Demo(flags.out, flags.fresh, flags.steps, flags.servers, flags.trainers, tuple(flags.train)))
    except DemoError as error:
        print(f"zero-ps demo: {error}", file=sys.stderr)
        return error.status
    except OSError as error:
        print(f"zero-ps demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("zero-ps demo: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="zero-ps demo",
        description="Trains a byte-level GPT with parameter servers and trainers on this machine. Run again, it "
        "goes on from the last commit.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: runs/demo")
    parser.add_argument("--fresh", action="store_true", help="delete what an earlier demo left there, and start over")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"how many steps to make (default: {STEPS})")
    parser.add_argument("--servers", type=int, default=None, metavar="N", help="default: 2")
    parser.add_argument("--trainers", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument(
        "train",
        nargs="*",
        metavar="-- FLAG",
        help="flags after -- go to the training application (see zero-ps train); the demo's own --servers, --job, "
        "--steps, --step-log and --summary stay as they are",
    )
    return parser


def _run(demo: Demo) -> int:
    for name in ("steps", "servers", "trainers"):
        value = getattr(demo, name)
        if value is not None and value < 1:
            raise DemoError(f"--{name} has to be at least 1, not {value}", status=2)
    paths = Paths(demo.out)
    with claimed(paths, fresh=demo.fresh, servers=demo.servers) as servers:
        return _serve_and_train(demo, paths, servers)


def _serve_and_train(demo: Demo, paths: Paths, servers: int) -> int:
    print(f"starting {servers} servers; their stores are in {paths.state}", flush=True)
    with _started(servers, paths) as (cluster, step):
        # A run that was cut short is finished; one that was done is continued for as long again.
        steps = demo.steps if step < demo.steps else step + demo.steps
        if step > 0:
            print(f"going on from the commit at step {step}, up to step {steps} (--fresh starts over)")
        print(f"starting {demo.trainers} trainers; Ctrl-C commits and stops", flush=True)
        status = _train(demo, paths, cluster.addresses, steps)
        if status == 0:
            peaks = {
                f"server-{i}": int(server_status(address).peak_rss_bytes) for i, address in enumerate(cluster.addresses)
            }
            conclude(paths, peaks, cluster.data_dirs)
    if status == 130:
        print("stopped; the same command goes on from the last commit")
    return status


@contextmanager
def _started(servers: int, paths: Paths) -> Iterator[tuple[LocalCluster, int]]:
    """Running servers and the step that they have in common."""
    with ExitStack() as stack:
        try:
            cluster = stack.enter_context(LocalCluster(servers=servers, data_dir=paths.state))
            step = _committed_step(cluster.data_dirs)
        except (RuntimeError, StoreError, OSError) as error:
            # The last line of a server's log is why it ended.
            raise DemoError(f"the servers cannot start: {str(error).splitlines()[-1]}", status=2) from error
        yield cluster, step


def _committed_step(data_dirs: Sequence[Path]) -> int:
    """The newest step that every server has a generation of; 0 without one."""
    committed = [
        set(JobStore(Path(folder), JOB, shard, len(data_dirs)).committed()) for shard, folder in enumerate(data_dirs)
    ]
    return max((key.step for key in set.intersection(*committed)), default=0)


def _train(demo: Demo, paths: Paths, addresses: Sequence[str], steps: int) -> int:
    """Runs the trainers to their end. 0, or 130 after Ctrl-C; raises DemoError when one fails."""
    # The demo's own flags come last, and so count: it reads what they name.
    command = [
        *(sys.executable, "-m", "trainer", *demo.train),
        *("--servers", ",".join(addresses), "--job", JOB, "--steps", str(steps)),
        *("--step-log", str(paths.log), "--summary", str(paths.trainer_summary)),
    ]
    paths.trainer_summary.unlink(missing_ok=True)
    threads = max(1, (os.cpu_count() or 1) // demo.trainers)
    with ExitStack() as stack:
        trainers: list[subprocess.Popen[bytes]] = []
        logs: list[Path | None] = []
        stack.callback(_stop, trainers)
        for rank in range(demo.trainers):
            environment = {
                # Credentials are of other servers than these.
                **{name: value for name, value in os.environ.items() if not name.startswith("ZERO_PS_")},
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(demo.trainers),
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
                # Servers need the cores that threads would spin on while they wait for each other.
                "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive"),
            }
            # Rank 0 draws on this terminal; what the others say is shown if they fail.
            log = paths.trainer_log(rank) if rank > 0 else None
            output: IO[bytes] | None = stack.enter_context(log.open("wb")) if log is not None else None
            logs.append(log)
            # In a session of its own, so that Ctrl-C reaches a trainer once, from here.
            trainers.append(
                subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
            )
        try:
            failed = _wait(trainers)
        except KeyboardInterrupt:
            print("\nstopping after this step", flush=True)
            _interrupt(trainers)
            return 130
        if failed is None:
            return 0
        log = logs[failed]
        said = f":\n{log.read_text(errors='replace').strip()}" if log is not None else "; what it said is above"
        raise DemoError(f"trainer {failed} ended with exit status {trainers[failed].returncode}{said}")


def _wait(trainers: Sequence["subprocess.Popen[bytes]"]) -> int | None:
    """Waits for all; returns early with the rank of the first that fails."""
    while True:
        codes = [trainer.poll() for trainer in trainers]
        failed = [rank for rank, code in enumerate(codes) if code not in (None, 0)]
        if failed:
            return failed[0]
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.05)


def _interrupt(trainers: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Asks the trainers to commit and waits until they have, or for another Ctrl-C."""
    for trainer in trainers:
        if trainer.poll() is None:
            trainer.send_signal(signal.SIGINT)
    until = time.monotonic() + STOP_SECONDS
    while time.monotonic() < until and any(trainer.poll() is None for trainer in trainers):
        time.sleep(0.05)


def _stop(trainers: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Ends what still runs. Nothing is lost by it but steps since the last commit."""
    for trainer in trainers:
        if trainer.poll() is None:
            trainer.kill()
    for trainer in trainers:
        trainer.wait()
