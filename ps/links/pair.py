"""The links between hosts: a pair of the server and one trainer moves what is large, and messages the rest."""

import contextlib
import re
import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass

import torch

from protos import pair
from protos import zero_ps_pb2 as pb
from protos.pair import DEPTH, Exchange, Pair, Work
from ps.errors import Cancelled, InvalidRequest, ServerError, Timeout
from ps.links.base import Block, Claim, Link, LinkKind, LinkRefused
from ps.links.grpc import messages
from ps.links.leaving import Leaving
from ps.tier import Lent

_TOKEN = re.compile(r"[0-9a-f]{32}")
_TOGETHER_SECONDS = 0.001
"""Parcels that are ready within this time share a message: to say so of each takes both ends longer than to send it.
Those behind one that took longer, as what has to be converted does, are not waited for."""

_UNCLAIMED_SECONDS = 30.0
_MAX_UNCLAIMED = 256


@dataclass(frozen=True)
class _Parcel:
    """Bytes that are about to be sent. lent: what they are of, if they are not the parcel's own."""

    data: torch.Tensor
    lent: Lent | None

    @property
    def size(self) -> int:
        return self.data.numel()


class PairLink(Link):
    """Sends what is large as parcels, from where it is if it stays there, and the rest in messages."""

    def __init__(self, kind: str, pair: Pair) -> None:
        self.kind = kind
        self._pair: Pair | None = pair
        self._tag = 0
        self._leaving = Leaving(kind, self._wait_quietly)
        self._broken = False

    def answer(self, request_id: int, blocks: Iterable[Block | None]) -> Iterator[tuple[bytes | pb.PullResponse, int]]:
        small: list[Block] = []
        ready: deque[_Parcel] = deque()
        ready_since = 0.0
        sent = False
        try:
            for block in blocks:
                large = block is not None and block.num_bytes >= pair.SMALL_BYTES
                # What came before goes before.
                if small and (block is None or large):
                    yield from messages(request_id, small)
                    small, sent = [], True
                if ready and not large:
                    yield from self._send(request_id, ready)
                    sent = True
                if block is None:
                    continue
                if not large:
                    small.append(block)
                    continue
                for parcel in _parcels(block):
                    full = not self._leaving.has_room(parcel.size, parcel.lent)
                    if ready and (full or time.monotonic() - ready_since > _TOGETHER_SECONDS):
                        yield from self._send(request_id, ready)
                        sent = True
                    self._leaving.take_room(parcel.size, parcel.lent)
                    if parcel.lent is not None:
                        parcel.lent.lend()
                    ready_since = ready_since if ready else time.monotonic()
                    ready.append(parcel)
            if ready:
                yield from self._send(request_id, ready)
            elif small or not sent:
                yield from messages(request_id, small)
        finally:
            for parcel in ready:
                if parcel.lent is not None:
                    parcel.lent.give_back()
                self._leaving.give_room(parcel.size)

    def _send(self, request_id: int, ready: deque[_Parcel]) -> Iterator[tuple[pb.PullResponse, int]]:
        """Sends parcels, and says so; nothing is ready then."""
        announced = pb.PullResponse(request_id=request_id)
        for parcel in ready:
            self._tag = pair.next_tag(self._tag)
            announced.parcels.add(tag=self._tag, size=parcel.size)
        size = sum(parcel.size for parcel in ready)
        leaves_by = self._open_pair()
        if leaves_by.device is not None:
            # A device that sends already may keep this process from saying so.
            yield announced, size
        for said in announced.parcels:
            with self._breaks():
                work = leaves_by.send(ready[0].data, said.tag)
            self._leaving.add(work, said.size, ready.popleft().lent)
        # The last ones would stay for as long as what follows takes.
        del work, parcel
        if leaves_by.device is None:
            # What the trainer hears of is on its way then.
            yield announced, size

    def received(self, header: pb.PushHeader, claim: Claim) -> Generator[memoryview | int, None, None]:
        _check_sizes(header)
        waiting = deque(header.parcels)
        coming: deque[tuple[Work, torch.Tensor, bool]] = deque()
        try:
            while waiting or coming:
                while waiting and len(coming) < DEPTH:
                    parcel = waiting[0]
                    place = claim(parcel.size)
                    target = torch.empty(parcel.size, dtype=torch.uint8) if place is None else place
                    coming.append((self._receive(target, parcel.tag), target, place is not None))
                    waiting.popleft()
                work, target, in_place = coming[0]
                self._wait(work)
                coming.popleft()
                yield target.numel() if in_place else target.numpy().data
        finally:
            # Where a push ends early, its memory is another's next.
            for work, *_ in coming:
                self._wait_quietly(work)

    def discard(self, header: pb.PushHeader) -> None:
        _check_sizes(header)
        for parcel in header.parcels:
            if parcel.tag == self._open_pair().expected:
                self._wait(self._receive(torch.empty(parcel.size, dtype=torch.uint8), parcel.tag))

    def _receive(self, target: torch.Tensor, tag: int) -> Work:
        with self._breaks():
            return self._open_pair().receive(target, tag)

    def _wait(self, work: Work) -> None:
        with self._breaks():
            work.wait()

    def _wait_quietly(self, work: Work) -> None:
        """Returns when nothing touches a parcel's memory any more."""
        # Whoever moves the next one is told what is wrong, and the trainer finds out itself. A wait for another parcel
        # of a pair that is broken may last as long as the first one did.
        if not self._broken:
            with contextlib.suppress(ServerError):
                self._wait(work)

    @contextlib.contextmanager
    def _breaks(self) -> Iterator[None]:
        """What fails leaves nothing under way that could touch memory later."""
        try:
            yield
        except RuntimeError as error:
            if self._pair is not None:
                self._pair.abort()
            # Only now: who need not wait for a parcel takes its memory for something else.
            self._broken = True
            raise Timeout(f"the trainer does not move the bytes of the {self.kind} link: {error}") from error

    def _open_pair(self) -> Pair:
        if self._pair is None:
            raise Cancelled("the trainer has left the link")
        return self._pair

    def close(self) -> None:
        # What waits for the other end holds the pair, and hears of its end when the trainer is gone.
        left, self._pair = self._pair, None
        if left is not None:
            left.leave()
        self._leaving.close()


def _parcels(block: Block) -> Iterator[_Parcel]:
    """A block where it is, if it can be lent, which is until the next parcel is asked for; copies of it otherwise."""
    with block.lent() as lent:
        for start in range(0, block.num_bytes, pair.PARCEL_BYTES):
            stop = min(start + pair.PARCEL_BYTES, block.num_bytes)
            if lent is None:
                yield _Parcel(torch.frombuffer(block.read(start, stop), dtype=torch.uint8), None)
            else:
                bytes_of = lent.tensor.view(-1).view(torch.uint8)
                yield _Parcel(bytes_of[block.start + start : block.start + stop], lent)


def _check_sizes(header: pb.PushHeader) -> None:
    if any(not 0 < parcel.size <= pair.PARCEL_BYTES for parcel in header.parcels):
        raise InvalidRequest(f"parcels have 1 to {pair.PARCEL_BYTES} bytes")


class _Forming:
    """An end that is being made. pair, error: what came of it."""

    def __init__(self) -> None:
        self.address = b""
        self.pair: Pair | None = None
        self.error = ""
        self.begun_at = time.monotonic()


class PairKind(LinkKind):
    """Makes the server's ends of pairs, each when a trainer asks for one."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._forming: dict[str, _Forming] = {}

    @abstractmethod
    def _make(self, request: pb.PrepareLinkRequest, exchange: Exchange) -> Pair:
        """This server's end. Raises what is wrong."""

    @abstractmethod
    def _where(self, request: pb.PrepareLinkRequest) -> str:
        """Where it would be, for an error: 'at 10.0.0.1'."""

    def prepare(self, request: pb.PrepareLinkRequest) -> pb.PrepareLinkResponse:
        if not _TOKEN.fullmatch(request.token):
            raise InvalidRequest(f"the token of a {self.kind} link has 32 of the characters 0-9 and a-f")
        if not 0 < len(request.address) <= pair.MAX_ADDRESS_BYTES or not 0 < len(request.host) <= 253:
            raise InvalidRequest(f"a {self.kind} link needs the address of the trainer's end, and the server's host")
        forming = _Forming()
        with self._changed:
            self._forget_unclaimed()
            if request.token in self._forming or len(self._forming) >= _MAX_UNCLAIMED:
                raise InvalidRequest("this link is being prepared already, or too many are")
            self._forming[request.token] = forming
        threading.Thread(target=self._form, args=(forming, request), name=self.kind, daemon=True).start()
        with self._changed:
            self._changed.wait_for(lambda: forming.address or forming.error, pair.FORM_SECONDS)
            if not forming.address:
                self._forming.pop(request.token, None)
                raise InvalidRequest(
                    f"the server cannot make its end of a {self.kind} link {self._where(request)}: "
                    f"{forming.error or 'no answer'}"
                )
        return pb.PrepareLinkResponse(address=forming.address)

    def _form(self, forming: _Forming, request: pb.PrepareLinkRequest) -> None:
        def exchange(mine: bytes, receive: object) -> None:
            with self._changed:
                forming.address = mine
                self._changed.notify_all()
            receive(request.address)  # type: ignore[operator]

        try:
            formed = self._make(request, exchange)
        except Exception as error:
            with self._changed:
                forming.error = str(error) or type(error).__name__
                self._changed.notify_all()
            return
        with self._changed:
            forming.pair = formed
            self._changed.notify_all()

    def accept(self, offer: pb.LinkOffer) -> Link:
        with self._changed:
            forming = self._forming.pop(offer.token, None)
            if forming is None:
                raise LinkRefused("the trainer did not prepare it with this server")
            self._changed.wait_for(lambda: forming.pair or forming.error, pair.FORM_SECONDS)
            if forming.pair is None:
                raise LinkRefused(f"the two ends did not find each other: {forming.error or 'no answer'}")
            formed, forming.pair = forming.pair, None
            return PairLink(self.kind, formed)

    def _forget_unclaimed(self) -> None:
        now = time.monotonic()
        for token, forming in list(self._forming.items()):
            if now - forming.begun_at > _UNCLAIMED_SECONDS:
                del self._forming[token]
                if forming.pair is not None:
                    forming.pair.leave()
