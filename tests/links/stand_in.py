"""A socket and a thread in place of NCCL and a GPU's stream: `NcclPair` and all above it run where there is none.

What it has in common with NCCL: no tags, the order of the calls, a stream that waits where the other end does not come,
and a first move that returns only when the other end makes it, too. Run as a program, it is `ps`.
"""

import contextlib
import ctypes
import itertools
import queue
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ps.server
from protos import nccl, nccl_pair
from protos.cuda_stream import Stage
from tests import forks

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
    """A socket. Its two ends meet at a place that the id names."""

    def __init__(self, device: torch.device, unique_id: bytes, rank: int, seconds: float) -> None:
        self._error = ""
        self._met = False
        # Without a file: there is nothing to be removed.
        place = f"\0zero-ps-{unique_id[:32].decode()}"
        if rank == 0:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(place)
                listener.listen(1)
                listener.settimeout(seconds)
                self._socket, _ = listener.accept()
        else:
            self._socket = socket.socket(socket.AF_UNIX)
            end = time.monotonic() + seconds
            while self._socket.connect_ex(place):
                assert time.monotonic() < end, "the other end did not come"
                time.sleep(0.005)
        self._socket.settimeout(60)

    def send(self, address: int, nbytes: int, stream: int, seconds: float) -> None:
        self._move(self._send, address, nbytes, stream)

    def receive(self, address: int, nbytes: int, stream: int, seconds: float) -> None:
        self._move(self._receive, address, nbytes, stream)

    def _move(self, move: Callable[[memoryview], None], address: int, nbytes: int, stream: int) -> None:
        self.settled()
        if not self._met:
            self._socket.sendall(b"!")
            assert self._socket.recv(1) == b"!"
            self._met = True
        memory = memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")

        def run() -> None:
            if not self._error:
                try:
                    move(memory)
                except (OSError, ValueError) as error:
                    self._error = self._error or f"remote error: {error}"

        _streams[stream].add(run)

    def _send(self, memory: memoryview) -> None:
        self._socket.sendall(struct.pack("<Q", len(memory)))
        self._socket.sendall(memory)

    def _receive(self, memory: memoryview) -> None:
        (size,) = struct.unpack("<Q", self._read(memoryview(bytearray(8))))
        if size != len(memory):
            raise ValueError(f"{len(memory)} bytes are to be received where {size} were sent")
        self._read(memory)

    def _read(self, memory: memoryview) -> memoryview:
        left = memory
        while left:
            count = self._socket.recv_into(left)
            if not count:
                raise ConnectionResetError("the other end is gone")
            left = left[count:]
        return memory

    def settled(self) -> bool:
        if self._error:
            raise RuntimeError(self._error)
        return True

    @staticmethod
    def abort(*communicators: "Communicator") -> None:
        for each in communicators:
            each._error = each._error or "this end has left the pair"
            with contextlib.suppress(OSError):
                each._socket.shutdown(socket.SHUT_RDWR)
            each._socket.close()


def unique_id() -> bytes:
    return secrets.token_hex(nccl.ID_BYTES // 2).encode()


def patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, and in servers that it starts from here on."""
    monkeypatch.setattr(nccl, "library", lambda: SimpleNamespace(version=22700, unique_id=unique_id))
    monkeypatch.setattr(nccl, "why_not", lambda: "")
    monkeypatch.setattr(nccl_pair, "Communicator", Communicator)
    monkeypatch.setattr(nccl_pair, "CudaStream", Stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("ps.cluster.subprocess", _Popen())


class Point:
    """Of a device that is a little behind."""

    def __init__(self, device: torch.device) -> None:
        self._end = time.monotonic() + 0.003

    def query(self) -> bool:
        return time.monotonic() > self._end


def patch_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the CPU's memory count as that of the trainer's device, which links write to and read where it is."""
    monkeypatch.setattr("trainer.links.nccl.current_device", lambda: torch.device("cpu"))
    monkeypatch.setattr("trainer.landing.point", Point)
    monkeypatch.setattr("trainer.gradients.point", Point)


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
