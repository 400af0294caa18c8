"""A pair over a gloo process group of two: TCP, from host memory to host memory.

gloo finds the other end through a store; the two ends tell each other their addresses over gRPC instead, so
that it takes no store that listens somewhere.
"""

import datetime
import socket
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from protos import pair
from protos.pair import MOVE_SECONDS, Exchange, Pair


class _Exchange(dist.Store):  # type: ignore[name-defined,misc]
    """What gloo looks for in a store: this end's address goes out, the other end's comes in.

    send: called once, with this end's address.
    """

    def __init__(self, rank: int, send: Callable[[bytes], None]) -> None:
        super().__init__()
        self._mine = f"0/{rank}"
        self._send: Callable[[bytes], None] | None = send
        self._known: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._their_key = f"0/{1 - rank}"

    def receive(self, address: bytes) -> None:
        with self._changed:
            self._known[self._their_key] = address
            self._changed.notify_all()

    def set(self, key: str, value: bytes) -> None:
        with self._changed:
            self._known[key] = bytes(value)
        if key == self._mine and self._send is not None:
            # gloo keeps the store, and what sends may keep what gloo belongs to: a cycle that nobody collects.
            send, self._send = self._send, None
            send(bytes(value))

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._known[key]

    def wait(self, keys: list[str], timeout: datetime.timedelta | None = None) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: all(key in self._known for key in keys), pair.FORM_SECONDS):
                raise TimeoutError(f"the other end did not say within {pair.FORM_SECONDS:g} s where it is")


class _Work:
    def __init__(self, work: "dist.Work", memory: torch.Tensor) -> None:
        self._work = work
        self._memory = memory

    def wait(self, seconds: float = MOVE_SECONDS) -> None:
        self._work.wait(datetime.timedelta(seconds=seconds))


class GlooPair(Pair):
    """Making it returns when the other end has been made, too."""

    def __init__(self, rank: int, host: str, secret: str, exchange: Exchange) -> None:
        """host: a name or address of this end that the other one reaches.
        secret: what nobody knows but the two.

        Raises RuntimeError or OSError where the two do not find each other, or somebody else came.
        """
        super().__init__()
        self._other = 1 - rank
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = datetime.timedelta(seconds=pair.FORM_SECONDS)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host, lazy_init=False)]
        store = _Exchange(rank, lambda address: exchange(address, store.receive))
        # Its types do not know what it has.
        self._group: Any = dist.ProcessGroupGloo(store, rank, 2, options)
        self._meet(rank, secret)

    def send(self, data: torch.Tensor, tag: int) -> _Work:
        return _Work(self._group.send([data], self._other, tag), data)

    def _receive(self, target: torch.Tensor, tag: int) -> _Work:
        return _Work(self._group.recv([target], self._other, tag), target)

    def abort(self) -> None:
        self._group.abort()


def local_address(host: str, port: int) -> str:
    """The address from which this machine reaches another. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        # Sends nothing; only the route is looked up.
        probe.connect(address)
        return str(probe.getsockname()[0])


def why_not() -> str:
    """Why this torch has no gloo; empty if it has."""
    if not dist.is_available() or not dist.is_gloo_available():
        return "this torch is built without gloo"
    return ""
