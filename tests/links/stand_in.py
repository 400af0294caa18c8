"""gloo and a thread in place of NCCL and a GPU's stream, so that `NcclPair` and all above it run where there is none.

What it has in common with NCCL: no tags, the order of the calls, a stream that waits where the other end does not come,
and a first move that returns only when the other end makes it, too. Run as a program, it is `ps`.
"""

import ctypes
import datetime
import itertools
import queue
import secrets
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

import ps.server
from protos import nccl, nccl_pair
from protos.cuda_stream import Stage
from tests import forks

ONLY_TAG = 7
_handles = itertools.count(1)
_streams: dict[int, "Stream"] = {}


class Stream:
    def __init__(self, device: torch.device) -> None:
        self.handle = next(_handles)
        _streams[self.handle] = self
        self._calls: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            self._calls.get()()

    def add(self, call: Callable[[], object]) -> None:
        self._calls.put(call)

    def stage(self, nbytes: int) -> Stage:
        return Stage(torch.empty(nbytes, dtype=torch.uint8), torch.empty(nbytes, dtype=torch.uint8))

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.add(lambda: target.copy_(source))

    def mark(self) -> Any:
        done = threading.Event()
        self.add(done.set)
        return SimpleNamespace(reached=done.is_set)


class Communicator:
    def __init__(self, device: torch.device, unique_id: bytes, rank: int, seconds: float) -> None:
        self._peer = 1 - rank
        self._error = ""
        self._met = False
        store = FileStore(str(Path(tempfile.gettempdir(), f"zero-ps-{unique_id[:32].decode()}")), 2)
        self._group: Any = dist.ProcessGroupGloo(store, rank, 2, datetime.timedelta(seconds=seconds))

    def send(self, address: int, nbytes: int, stream: int, seconds: float) -> None:
        self._move(self._group.send, address, nbytes, stream, seconds)

    def receive(self, address: int, nbytes: int, stream: int, seconds: float) -> None:
        self._move(self._group.recv, address, nbytes, stream, seconds)

    def _move(self, move: Any, address: int, nbytes: int, stream: int, seconds: float) -> None:
        self.settled()
        if not self._met:
            for first in (move, self._group.recv if move == self._group.send else self._group.send):
                first([torch.zeros(1)], self._peer, ONLY_TAG).wait(datetime.timedelta(seconds=seconds))
            self._met = True
        memory = torch.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype=torch.uint8)

        def run() -> None:
            if not self._error:
                try:
                    move([memory], self._peer, ONLY_TAG).wait(datetime.timedelta(seconds=60))
                except RuntimeError as error:
                    self._error = self._error or str(error)

        _streams[stream].add(run)

    def settled(self) -> bool:
        if self._error:
            raise RuntimeError(self._error)
        return True

    def abort(self) -> None:
        self._error = self._error or "this end has left the pair"
        self._group.abort()


def unique_id() -> bytes:
    return secrets.token_hex(nccl.ID_BYTES // 2).encode()


def patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, and in servers that it starts from here on."""
    monkeypatch.setattr(nccl, "library", lambda: SimpleNamespace(version=21800, unique_id=unique_id))
    monkeypatch.setattr(nccl, "why_not", lambda: "")
    monkeypatch.setattr(nccl_pair, "Communicator", Communicator)
    monkeypatch.setattr(nccl_pair, "CudaStream", Stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("ps.cluster.subprocess", _Popen())


class _Popen:
    """Starts this program in place of `ps`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(forks, name)

    def Popen(self, command: list[str], **options: Any) -> Any:
        return forks.Popen([__name__ if part == "ps" else part for part in command], **options)


if __name__ == "__main__":
    from ps.cli import main

    patch(pytest.MonkeyPatch())
    ps.server.check_device = lambda device: None
    sys.exit(main())
