"""One trainer and one server that move parcels of bytes past gRPC, apart from torch's default process group.

What moves them takes whoever connects for the other end. So the two prove to each other, over the pair itself, that
they know the secret that went over gRPC with what they need to find each other.
"""

import hashlib
import hmac
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import torch

SERVER, TRAINER = 0, 1
"""The ranks of a pair."""

FORM_SECONDS = 10.0
"""How long the two ends may take to find each other."""

MOVE_SECONDS = 15.0
"""How long the other end may take for one parcel. One that takes longer is stopped or cut off."""

ROOM_SECONDS = 600.0
"""How long a trainer waits for room to send: a server takes nothing of a push before what it is of is due, which may
depend on other trainers. Leases tell whether it lives."""

PARCEL_BYTES = 8 << 20
"""The most bytes that are sent at once."""

DEPTH = 3
"""How many parcels of a direction are on their way at once: one is being moved, and the next ones are ready."""

SMALL_BYTES = 64 << 10
"""What is smaller costs less as a part of a gRPC message."""

MAX_ADDRESS_BYTES = 4096

_PROOF_TAG = 0
"""Parcels begin at 1."""

Exchange = Callable[[bytes, Callable[[bytes], None]], None]
"""Called with what the other end needs to find this one, and with what to call with the other's."""


class Work(Protocol):
    """A parcel on its way. Keeps the memory that it is in."""

    def wait(self, seconds: float = MOVE_SECONDS) -> None:
        """Raises RuntimeError when the other end is gone, or takes longer than that."""


class Pair(ABC):
    """One end. Not all that moves bytes knows tags, so parcels are received in the order in which they are sent.

    One thread at a time sends, and one receives.

    device: whose memory is sent and received where it is; None where that is the host's.
    """

    device: torch.device | None = None

    def __init__(self) -> None:
        # The tag of the parcel that comes next.
        self.expected = _PROOF_TAG

    @abstractmethod
    def send(self, data: torch.Tensor, tag: int) -> Work:
        """data: 1-d, contiguous, at most `PARCEL_BYTES`, not to be changed before the work is done.

        Waits until there is room, which takes the other end. Raises RuntimeError as `Work.wait` does.
        """

    def receive(self, target: torch.Tensor, tag: int) -> Work:
        """tag: of a parcel that the other end has sent, or will. Raises as `send`, and for one out of turn."""
        if tag != self.expected:
            raise RuntimeError(f"parcel {tag} was announced where parcel {self.expected} comes next")
        self.expected = next_tag(tag)
        return self._receive(target, tag)

    @abstractmethod
    def _receive(self, target: torch.Tensor, tag: int) -> Work: ...

    @abstractmethod
    def abort(self) -> None:
        """Ends what is under way, at once: no memory is written to or read any more. Safe to call twice."""

    def leave(self) -> None:  # noqa: B027 (most end with whoever waits for the other end)
        """Nobody begins anything any more. Does not wait. Safe to call twice."""

    def _meet(self, rank: int, secret: str) -> None:
        """Returns when the other end is the one that is meant."""
        theirs = _proof(secret, 1 - rank)
        came = torch.empty(len(theirs), dtype=torch.uint8)
        mine = torch.frombuffer(bytearray(_proof(secret, rank)), dtype=torch.uint8)
        # One after the other: either may wait for its counterpart.
        if rank == SERVER:
            sent, coming = self.send(mine, _PROOF_TAG), self.receive(came, _PROOF_TAG)
        else:
            coming, sent = self.receive(came, _PROOF_TAG), self.send(mine, _PROOF_TAG)
        coming.wait(FORM_SECONDS)
        sent.wait(FORM_SECONDS)
        if not hmac.compare_digest(bytes(came.tolist()), theirs):
            raise RuntimeError("somebody else connected in place of the other end")


def next_tag(tag: int) -> int:
    return (tag + 1) % (1 << 31)


def _proof(secret: str, rank: int) -> bytes:
    """What the end of this rank shows to the other."""
    return hmac.digest(secret.encode(), f"zero-ps pair, rank {rank}".encode(), hashlib.sha256)
