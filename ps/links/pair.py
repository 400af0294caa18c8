"""The links between hosts: a pair of the server and one trainer moves what is large, and messages the rest."""

import contextlib
import queue
import re
import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Generator, Iterable, Iterator

import torch

from protos import pair
from protos import zero_ps_pb2 as pb
from protos.pair import DEPTH, Exchange, Pair, Work
from ps.errors import Cancelled, InvalidRequest, ServerError, Timeout
from ps.links.base import Block, Claim, Link, LinkKind, LinkRefused
from ps.links.grpc import messages
from ps.tier import Lent

_TOKEN = re.compile(r"[0-9a-f]{32}")
_UNCLAIMED_SECONDS = 30.0
_MAX_UNCLAIMED = 256


class PairLink(Link):
    """Sends what is large as parcels, from where it is if it stays there, and the rest in messages.

    A thread waits for what was sent, so that nothing is lent for longer than it takes, whatever is asked for next.
    """

    def __init__(self, kind: str, pair: Pair) -> None:
        self.kind = kind
        self._pair: Pair | None = pair
        self._tag = 0
        self._room = threading.Semaphore(DEPTH)
        # With what is lent until it has left; None behind the last.
        self._leaving: queue.SimpleQueue[tuple[Work, Lent | None] | None] = queue.SimpleQueue()
        self._waiter: threading.Thread | None = None
        # Of `_pair` and `_leaving`: nothing comes behind the last.
        self._lock = threading.Lock()

    def answer(self, request_id: int, blocks: Iterable[Block | None]) -> Iterator[tuple[bytes | pb.PullResponse, int]]:
        small: list[Block] = []
        sent = False
        for block in blocks:
            large = block is not None and block.num_bytes >= pair.SMALL_BYTES
            # What came before goes before.
            if small and (block is None or large):
                yield from messages(request_id, small)
                small, sent = [], True
            if block is None:
                continue
            if not large:
                small.append(block)
                continue
            yield from self._send_block(request_id, block)
            sent = True
        if small or not sent:
            yield from messages(request_id, small)

    def _send_block(self, request_id: int, block: Block) -> Iterator[tuple[pb.PullResponse, int]]:
        lent = block.lend(None)
        try:
            for start in range(0, block.num_bytes, pair.PARCEL_BYTES):
                stop = min(start + pair.PARCEL_BYTES, block.num_bytes)
                if lent is None:
                    data = torch.frombuffer(block.read(start, stop), dtype=torch.uint8)
                else:
                    data = lent.tensor.view(-1).view(torch.uint8)[block.start + start : block.start + stop]
                yield from self._send(request_id, data, lent)
        finally:
            if lent is not None:
                lent.give_back()

    def _send(self, request_id: int, data: torch.Tensor, lent: Lent | None) -> Iterator[tuple[pb.PullResponse, int]]:
        """Sends a parcel, and says so. lent: what it is of, if it is not the parcel's own."""
        if not self._room.acquire(timeout=pair.MOVE_SECONDS):
            raise Timeout(f"the trainer did not take a parcel of the {self.kind} link within {pair.MOVE_SECONDS:g} s")
        self._tag = pair.next_tag(self._tag)
        size = data.numel()
        announced = pb.PullResponse(request_id=request_id, parcels=[pb.Parcel(tag=self._tag, size=size)]), size
        leaves_by = self._open_pair()
        if leaves_by.device is not None:
            # A device that sends already may keep this process from saying so.
            yield announced
        with self._breaks():
            work = leaves_by.send(data, self._tag)
        if lent is not None:
            lent.lend()
        self._until_left(work, lent)
        del work
        if leaves_by.device is None:
            # What the trainer hears of is on its way then.
            yield announced

    def _until_left(self, work: Work, lent: Lent | None) -> None:
        """Has somebody wait for a parcel, and give back what it is of."""
        with self._lock:
            if self._pair is not None:
                self._leaving.put((work, lent))
                if self._waiter is None:
                    self._waiter = threading.Thread(target=self._wait_for_all, name=f"{self.kind} sent", daemon=True)
                    self._waiter.start()
                return
        self._wait_and_give_back(work, lent)

    def _wait_for_all(self) -> None:
        while (leaving := self._leaving.get()) is not None:
            self._wait_and_give_back(*leaving)
            # A local of an idle thread would keep what was sent last.
            del leaving

    def _wait_and_give_back(self, work: Work, lent: Lent | None) -> None:
        # Whoever sends next is told what is wrong, and the trainer finds out itself.
        with contextlib.suppress(ServerError):
            self._wait(work)
        if lent is not None:
            lent.give_back()
        self._room.release()

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
            with contextlib.suppress(ServerError):
                for work, *_ in coming:
                    self._wait(work)

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

    @contextlib.contextmanager
    def _breaks(self) -> Iterator[None]:
        """What fails leaves nothing under way that could touch memory later."""
        try:
            yield
        except RuntimeError as error:
            if self._pair is not None:
                self._pair.abort()
            raise Timeout(f"the trainer does not move the bytes of the {self.kind} link: {error}") from error

    def _open_pair(self) -> Pair:
        if self._pair is None:
            raise Cancelled("the trainer has left the link")
        return self._pair

    def close(self) -> None:
        # What waits for the other end holds the pair, and hears of its end when the trainer is gone.
        with self._lock:
            left, self._pair = self._pair, None
            self._leaving.put(None)
        if left is not None:
            left.leave()


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
