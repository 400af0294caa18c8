"""Many sessions against one server at once: `python -m tests.load --sessions 32 --seconds 60`.

Each trains a job of its own: pulls its weights, pushes a gradient, steps, over and over. No call may fail, the server's
memory has to stay as it is, and the slowest session has to get at least half of what they get on average.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from protos import zero_ps_pb2 as pb
from ps import LocalCluster
from tests.ps.client import Client

_ROOT = Path(__file__).parent.parent
WORKERS = 4
"""Processes that the sessions are spread over: one alone would be what limits them."""

ELEMENTS = 1 << 16
WARM_SECONDS = 0.3
"""Share of the time after which memory is looked at first: by then every buffer has been needed."""


@dataclass(frozen=True)
class Load:
    """steps: of each session. rss: of the server, after the warm-up and in the end, in bytes."""

    steps: tuple[int, ...]
    rss: tuple[int, int]

    @property
    def share(self) -> float:
        """Of the slowest, as a fraction of the mean."""
        return min(self.steps) * len(self.steps) / max(1, sum(self.steps))

    def __str__(self) -> str:
        first, last = (size / (1 << 20) for size in self.rss)
        return (
            f"{sum(self.steps)} steps of {len(self.steps)} sessions, {min(self.steps)} to {max(self.steps)} each (the "
            f"slowest has {self.share:.2f} of the mean); the server's memory went from {first:.0f} to {last:.0f} MiB"
        )


def load(sessions: int, seconds: float, say: Callable[[str], None] = print) -> Load:
    """Raises AssertionError if a call failed."""
    with LocalCluster(1, lease=60) as cluster:
        (address,) = cluster.addresses
        workers = []
        for worker in range(WORKERS):
            numbers = range(worker, sessions, WORKERS)
            command = [sys.executable, "-m", "tests.load", "--worker", address, json.dumps(list(numbers)), str(seconds)]
            workers.append(
                subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
            )
        for process in workers:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        # All begin together.
        for process in workers:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        time.sleep(WARM_SECONDS * seconds)
        before = _rss(address)
        steps: list[int] = []
        for process in workers:
            output, _ = process.communicate(timeout=seconds + 120)
            assert process.returncode == 0, output
            steps += json.loads(output.splitlines()[-1])
        return Load(tuple(steps), (before, _rss(address)))


def _rss(address: str) -> int:
    import grpc

    from protos import zero_ps_pb2_grpc

    with grpc.insecure_channel(address) as channel:
        stub = zero_ps_pb2_grpc.ParameterServerStub(channel)
        return int(stub.Status(pb.StatusRequest(), timeout=60).rss_bytes)


def _work(address: str, numbers: Sequence[int], seconds: float) -> None:
    torch.set_num_threads(1)
    steps, failed = [0] * len(numbers), []
    clients = []
    for number in numbers:
        client = Client(address, job=f"load-{number}")
        client.open_job({"w": torch.zeros(ELEMENTS)})
        client.push_weight(0, torch.zeros(ELEMENTS))
        client.set_optimizer("SGD", lr=1.0)
        clients.append(client)
    print("ready", flush=True)
    sys.stdin.readline()
    end = time.monotonic() + seconds

    def train(place: int) -> None:
        client, gradient, step = clients[place], torch.ones(ELEMENTS), 0
        try:
            while time.monotonic() < end:
                client.push_gradient(0, gradient, step=step)
                client.step(step)
                step += 1
                assert client.pull(0, version=step)[0] == -step
                client.call("ZeroGrad", step=step)
                steps[place] = step
        except BaseException as error:
            failed.append(f"session {numbers[place]}: {error!r}")

    threads = [threading.Thread(target=train, args=(place,)) for place in range(len(numbers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        print("\n".join(failed))
        sys.exit(1)
    print(json.dumps(steps), flush=True)


def check(result: Load) -> None:
    assert min(result.steps) > 0, result
    assert result.share >= 0.5, result
    first, last = result.rss
    assert last <= first + (48 << 20), result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        address, numbers, seconds = options.worker
        _work(address, json.loads(numbers), float(seconds))
        return 0
    result = load(options.sessions, options.seconds)
    print(f"load: {result}")
    check(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
