"""A gloo process group of two and nothing else: what the `gloo` link is compared with. Run as a program it is the
other end."""

import datetime
import functools
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from protos.layout import CHUNK_BYTES

_PARCEL_BYTES = CHUNK_BYTES
"""As the link moves the parameters that it is compared with."""

_DEPTH = (32 << 20) // _PARCEL_BYTES
"""Parcels on their way at once: two parameters, as of the link."""


@dataclass(frozen=True)
class BarePair:
    """A process and a group with it."""

    process: "subprocess.Popen[str]"
    group: "dist.ProcessGroupGloo"

    @property
    def pid(self) -> int:
        return self.process.pid

    def pull(self, nbytes: int) -> float:
        """Receives that many bytes in parcels of the link's size. Seconds."""
        return self._move("send", nbytes, functools.partial(_receive, self.group, 0))

    def push(self, nbytes: int) -> float:
        return self._move("receive", nbytes, functools.partial(_send, self.group, 0))

    def _move(self, word: str, nbytes: int, move: Callable[[torch.Tensor], dist.Work]) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{word} {nbytes}\n")
        self.process.stdin.flush()
        begin = time.perf_counter()
        _all(nbytes, move)
        self.process.stdout.readline()
        return time.perf_counter() - begin


@contextmanager
def bare_pair() -> Iterator[BarePair]:
    """The other end in a process of its own, which ends with the context."""
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            [sys.executable, "-m", __name__, f"{folder}/store"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        try:
            yield BarePair(process, _group(f"{folder}/store", 1))
        finally:
            process.kill()


def _group(store: str, rank: int) -> "dist.ProcessGroupGloo":
    return dist.ProcessGroupGloo(FileStore(store, 2), rank, 2, datetime.timedelta(seconds=60))


def _send(group: "dist.ProcessGroupGloo", other: int, data: torch.Tensor) -> dist.Work:
    return group.send([data], other, 1)  # type: ignore[attr-defined, no-any-return]


def _receive(group: "dist.ProcessGroupGloo", other: int, data: torch.Tensor) -> dist.Work:
    return group.recv([data], other, 1)  # type: ignore[attr-defined, no-any-return]


@functools.cache
def _memory() -> list[torch.Tensor]:
    """Used again by every move, as the link's: pages that nobody had yet take longer than to fill them."""
    return [torch.ones(_PARCEL_BYTES, dtype=torch.uint8) for _ in range(_DEPTH)]


def _all(nbytes: int, move: Callable[[torch.Tensor], dist.Work]) -> None:
    memory = _memory()
    under_way: deque[dist.Work] = deque()
    for number in range(nbytes // _PARCEL_BYTES):
        if len(under_way) == _DEPTH:
            under_way.popleft().wait()
        under_way.append(move(memory[number % _DEPTH]))
    for work in under_way:
        work.wait()


def _serve(store: str) -> None:
    group = _group(store, 0)
    for line in sys.stdin:
        word, nbytes = line.split()
        move = _send if word == "send" else _receive
        _all(int(nbytes), functools.partial(move, group, 1))
        print("done", flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
