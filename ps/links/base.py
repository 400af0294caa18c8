"""The interface of a link on the server's side. Versions, order and errors are not its business."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from protos import zero_ps_pb2 as pb
from protos.segment import Arena
from ps.errors import InvalidRequest
from ps.tier import Lent


class LinkRefused(Exception):
    """This kind of link cannot be used; the message says why, for whoever wonders about speed."""


def _nothing_to_lend(arena: Arena | None) -> Lent | None:
    return None


class Read(Protocol):
    """Bytes `start` to `stop` of something, behind `head`: put together here, a message is copied once."""

    def __call__(self, start: int, stop: int, head: bytes = b"") -> bytes: ...


@dataclass(frozen=True)
class Block:
    """Bytes that leave together, such as a chunk's at one version.

    read: Raises a ServerError when they are not what was asked for any more.
    copy: fills a 1-d uint8 tensor of `num_bytes`; raises as `read`. None for what is small or seldom asked for.
    lend: memory that has them from its byte `start` on, to be read there until it is given back: of an arena, or, if
        that is None, wherever it is; None where there is no such memory. Raises as `read`, and MemoryError.
    """

    num_bytes: int
    read: Read
    lend: Callable[[Arena | None], Lent | None] = _nothing_to_lend
    start: int = 0
    copy: Callable[[torch.Tensor], None] | None = None

    @contextmanager
    def lent(self) -> Iterator[Lent | None]:
        """What `lend` gives this process to read, until the block of code ends."""
        lent = self.lend(None)
        try:
            yield lent
        finally:
            if lent is not None:
                lent.give_back()


Claim = Callable[[int], torch.Tensor | None]
"""Where so many bytes are wanted that follow those it was called for before, as a 1-d uint8 tensor.

None where that cannot be said, or is not one place.
"""


Answer = Callable[[Iterable[bytes], Callable[[], None], Callable[[], bool]], Generator[bytes, None, None]]
"""Answers the messages of a stream, in order. The second argument ends the stream from another thread, the third one
tells whether the trainer is gone. Raises `protos.local_messages.StreamError` for what ends the stream."""


class Link(ABC):
    """Carries the bytes of one session.

    The Pull and Push streams call it from one thread each.
    """

    kind: str

    @abstractmethod
    def answer(self, request_id: int, blocks: Iterable[Block | None]) -> Iterator[tuple[bytes | pb.PullResponse, int]]:
        """The responses that give a trainer these blocks, back to back, and how many bytes each one gives.

        A response may be there as its bytes already. At least one, also if there is nothing to give. None among the
        blocks means that the next one will take a while: what is there is sent.
        """

    @abstractmethod
    def received(self, header: pb.PushHeader, claim: Claim) -> Generator[memoryview | int, None, None]:
        """The bytes of a push that come in another way than as messages, in order; a number of them for those that
        are where they were claimed.

        They are read before the next is asked for, and not after the push was acknowledged. Raises
        InvalidRequest for a header that names what this session does not have.
        """

    def discard(self, header: pb.PushHeader) -> None:  # noqa: B027 (what most bring needs nobody to take it)
        """A push was refused. Takes what of it is on its way and has not been received, so that what comes next is
        not taken for it.

        Raises a ServerError where it does not come: the link is of no more use then.
        """

    def serve(self, pulls: Answer, pushes: Answer) -> None:  # noqa: B027 (those of most come over gRPC)
        """The session is open. Has requests answered that come over the link itself."""

    def close(self) -> None:  # noqa: B027 (most have nothing to give up)
        """The session has ended. Safe to call twice, and with any lock held."""


class LinkKind(ABC):
    """One kind of link as this server has it, for all sessions."""

    kind: str

    def listening(self) -> pb.ServerLink:
        """What a trainer has to know before it offers this kind."""
        return pb.ServerLink(kind=self.kind)

    def prepare(self, request: pb.PrepareLinkRequest) -> pb.PrepareLinkResponse:
        """Begins to make a link that both ends make at the same time. Raises InvalidRequest."""
        raise InvalidRequest(f"a {self.kind} link needs no preparation")

    @abstractmethod
    def accept(self, offer: pb.LinkOffer) -> Link:
        """A link as a trainer offers it. Raises LinkRefused."""

    def close(self) -> None:  # noqa: B027 (most have nothing to give up)
        """The server stops."""
