"""A gloo process group of one trainer and one server, apart from torch's default group.

gloo finds the other end through a store; the two ends tell each other their addresses over gRPC instead, so
that it takes no store that listens somewhere. gloo takes whoever connects to an address for the other end, so
the two also prove to each other over the pair that they know the secret that went over gRPC with the addresses.
"""

import datetime
import hashlib
import hmac
import socket
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

SERVER, TRAINER = 0, 1
"""The ranks of a pair."""

FORM_SECONDS = 10.0
"""How long the two ends may take to find each other."""

MOVE_SECONDS = 15.0
"""How long the other end may take for one parcel. One that takes longer is stopped or cut off."""

PARCEL_BYTES = 8 << 20
"""The most bytes that are sent at once."""

SMALL_BYTES = 64 << 10
"""What is smaller costs less as a part of a gRPC message."""

MAX_ADDRESS_BYTES = 4096

_PROOF_TAG = 0
"""Parcels begin at 1."""


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
            if not self._changed.wait_for(lambda: all(key in self._known for key in keys), FORM_SECONDS):
                raise TimeoutError(f"the other end did not say within {FORM_SECONDS:g} s where it is")


class Pair:
    """One end of a process group of two. Making it returns when the other end has been made, too."""

    def __init__(
        self, rank: int, host: str, secret: str, exchange: Callable[[bytes, Callable[[bytes], None]], None]
    ) -> None:
        """host: a name or address of this end that the other one reaches.
        secret: what nobody knows but the two.
        exchange: called with this end's address and with what to call with the other's.

        Raises RuntimeError or OSError where the two do not find each other, or somebody else came.
        """
        self._other = 1 - rank
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = datetime.timedelta(seconds=FORM_SECONDS)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host, lazy_init=False)]
        store = _Exchange(rank, lambda address: exchange(address, store.receive))
        # Its types do not know what it has.
        self._group: Any = dist.ProcessGroupGloo(store, rank, 2, options)
        self._meet(_proof(secret, rank), _proof(secret, self._other))

    def _meet(self, mine: bytes, theirs: bytes) -> None:
        """Returns when the other end is the one that is meant."""
        limit = datetime.timedelta(seconds=FORM_SECONDS)
        came = torch.empty(len(theirs), dtype=torch.uint8)
        sent = self.send(torch.frombuffer(bytearray(mine), dtype=torch.uint8), _PROOF_TAG)
        self.receive(came, _PROOF_TAG).wait(limit)
        sent.wait(limit)
        if not hmac.compare_digest(bytes(came.tolist()), theirs):
            raise RuntimeError("somebody else connected in place of the other end")

    def send(self, data: torch.Tensor, tag: int) -> "dist.Work":
        """data: 1-d, contiguous, not to be changed before the work is done."""
        work: dist.Work = self._group.send([data], self._other, tag)
        return work

    def receive(self, target: torch.Tensor, tag: int) -> "dist.Work":
        work: dist.Work = self._group.recv([target], self._other, tag)
        return work

    def abort(self) -> None:
        """Ends what is under way, at once: no memory is written to or read any more. Safe to call twice."""
        self._group.abort()


def _proof(secret: str, rank: int) -> bytes:
    """What the end of this rank shows to the other."""
    return hmac.digest(secret.encode(), f"zero-ps pair, rank {rank}".encode(), hashlib.sha256)


def wait(work: "dist.Work") -> None:
    """Raises RuntimeError when the other end is gone, or takes longer than it may."""
    work.wait(datetime.timedelta(seconds=MOVE_SECONDS))


def local_address(host: str, port: int) -> str:
    """The address from which this machine reaches another. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        # Sends nothing; only the route is looked up.
        probe.connect(address)
        return str(probe.getsockname()[0])


def usable() -> str:
    """Why this torch has no gloo; empty if it has."""
    if not dist.is_available() or not dist.is_gloo_available():
        return "this torch is built without gloo"
    return ""
