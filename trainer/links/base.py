"""The interface of a link. Nothing above it knows by which transport the bytes come."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

import torch

from protos import zero_ps_pb2 as pb
from trainer.server import Server

ChunkKey = tuple[int, int]
"""Index of a parameter in the manifest (for staged data: its staging id) and of a chunk in its grid."""


Run = tuple[int, int]
"""Elements of a flattened chunk: the first one, and the one after the last."""


class PushKind(Enum):
    GRADIENT = "gradient"
    WEIGHT = "weight"
    STAGED = "staged"
    STATE = "state"


@dataclass(frozen=True)
class Pull:
    """Chunks wanted at one version.

    destinations: for each chunk a 1-d uint8 tensor of the chunk's size in bytes on the wire, on the CPU or on the
        link's device. They may be written at any time until the pull's future is done, also when it ends with an
        error.
    after: points that the device has to have come to before; the pull waits for them, and those behind it.
    dtype: on the wire; None means as stored.
    timeout: seconds that the server may wait for the version.
    array: which tensor of the chunks: empty for the weight, or optimizer state by its name.
    runs: for each chunk the elements that are wanted, ascending and apart; None for whole chunks.
    max_staleness: how many versions older each chunk may be.
    """

    version: int
    chunks: Sequence[ChunkKey]
    destinations: Sequence[torch.Tensor]
    dtype: torch.dtype | None
    timeout: float
    staged: bool = False
    array: str = ""
    runs: Sequence[Sequence[Run]] | None = None
    max_staleness: int = 0
    after: Sequence["torch.cuda.Event"] = ()


@dataclass(frozen=True)
class Push:
    """Bytes of chunks for a server.

    sources: for each chunk a 1-d uint8 tensor, on the CPU or on the link's device; not to be changed before the
        push's future is done.
    after: points that the device has to have come to before; the push waits for them, and those behind it.
    array: for optimizer state, its name.
    sequence: for gradients, how many contributions of this trainer to these chunks came before in
        the step.
    runs: for gradients, the elements of each chunk that they are of; None for whole chunks.
    final: for gradients, whether there are no more to these chunks in a step that was announced.
    """

    kind: PushKind
    step: int
    chunks: Sequence[ChunkKey]
    sources: Sequence[torch.Tensor]
    dtype: torch.dtype
    sequence: int = 0
    array: str = ""
    runs: Sequence[Sequence[Run]] | None = None
    final: bool = False
    after: Sequence["torch.cuda.Event"] = ()


class Link(ABC):
    """Carries bytes between this process and one server.

    Pulls are answered in the order in which they were asked, and pushes are counted in the order in
    which they were sent; between pulls and pushes there is no order. Neither method blocks on the
    network: the returned future is done when the bytes have arrived, or carries the error. After an
    error of the connection itself every outstanding and later future carries it.

    not_chosen: why each kind that would be better is not in use.
    device: whose memory it reads and writes where it is, besides the host's; None for none.
    """

    kind: str
    device: torch.device | None = None
    not_chosen: Mapping[str, str] = MappingProxyType({})

    def describe(self) -> str:
        """The kind, and why no better one is in use: 'grpc (shm: ...)'."""
        reasons = "; ".join(f"{kind}: {reason}" for kind, reason in self.not_chosen.items())
        return f"{self.kind} ({reasons})" if reasons else self.kind

    @abstractmethod
    def pull(self, pull: Pull) -> "Future[None]": ...

    @abstractmethod
    def push(self, push: Push) -> "Future[None]": ...

    @abstractmethod
    def close(self) -> None:
        """Ends the link; what is outstanding fails. Safe to call twice."""


class LinkUnusable(Exception):
    """This kind of link cannot be used; the message says why, for whoever wonders about speed."""


class Candidate(ABC):
    """A kind of link to one server that may work, before the server has chosen.

    What it takes is prepared when it is made, which raises LinkUnusable where it cannot be.
    """

    kind: str

    def offer(self) -> pb.LinkOffer:
        """What the server has to know of it."""
        return pb.LinkOffer(kind=self.kind)

    @abstractmethod
    def open(self, server: Server) -> Link:
        """The link, once the server has chosen it; the candidate is used up then."""

    def close(self) -> None:  # noqa: B027 (most have nothing to give up)
        """It was not chosen."""
