"""The link between hosts: a gloo process group of the server and one trainer."""

import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist

from protos import pair
from protos import zero_ps_pb2 as pb
from protos.pair import Pair
from ps.errors import Cancelled, InvalidRequest, Timeout
from ps.links.base import Block, Claim, Link, LinkKind, LinkRefused
from ps.links.grpc import messages

_DEPTH = 3
"""How many parcels are on their way at once: one is being sent, and the next ones are ready."""

_TOKEN = re.compile(r"[0-9a-f]{32}")
_UNCLAIMED_SECONDS = 30.0
_MAX_UNCLAIMED = 256


class GlooLink(Link):
    """Sends what is large as parcels, and the rest in messages."""

    kind = "gloo"

    def __init__(self, pair: Pair) -> None:
        self._pair: Pair | None = pair
        self._tag = 0
        self._leaving: deque[tuple[dist.Work, torch.Tensor]] = deque()

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
            for start in range(0, block.num_bytes, pair.PARCEL_BYTES):
                parcel = self._send(block.read(start, min(start + pair.PARCEL_BYTES, block.num_bytes)))
                yield pb.PullResponse(request_id=request_id, parcels=[parcel]), parcel.size
                sent = True
        if small or not sent:
            yield from messages(request_id, small)

    def _send(self, data: bytes) -> pb.Parcel:
        while len(self._leaving) >= _DEPTH:
            _wait(self._leaving.popleft()[0])
        self._tag = (self._tag + 1) % (1 << 31)
        tensor = torch.frombuffer(data, dtype=torch.uint8)
        self._leaving.append((self._group().send(tensor, self._tag), tensor))
        return pb.Parcel(tag=self._tag, size=len(data))

    def received(self, header: pb.PushHeader, claim: Claim) -> Iterator[memoryview | int]:
        if any(not 0 < parcel.size <= pair.PARCEL_BYTES for parcel in header.parcels):
            raise InvalidRequest(f"parcels have 1 to {pair.PARCEL_BYTES} bytes")
        waiting = deque(header.parcels)
        coming: deque[tuple[dist.Work, torch.Tensor, bool]] = deque()
        while waiting or coming:
            while waiting and len(coming) < _DEPTH:
                parcel = waiting.popleft()
                place = claim(parcel.size)
                target = torch.empty(parcel.size, dtype=torch.uint8) if place is None else place
                coming.append((self._group().receive(target, parcel.tag), target, place is not None))
            work, target, in_place = coming.popleft()
            _wait(work)
            yield target.numel() if in_place else target.numpy().data

    def _group(self) -> Pair:
        if self._pair is None:
            raise Cancelled("the trainer has left the link")
        return self._pair

    def close(self) -> None:
        # What waits for the other end holds the group, and hears of its end when the trainer is gone.
        self._pair = None
        self._leaving.clear()


def _wait(work: dist.Work) -> None:
    try:
        pair.wait(work)
    except RuntimeError as error:
        raise Timeout(f"the trainer does not move the bytes of the gloo link: {error}") from error


class _Forming:
    """An end that is being made. pair, error: what came of it."""

    def __init__(self) -> None:
        self.address = b""
        self.pair: Pair | None = None
        self.error = ""
        self.begun_at = time.monotonic()


class GlooKind(LinkKind):
    """Makes the server's ends of pairs, each when a trainer asks for one.

    advertise: the address at which trainers reach this server; None for the one that each of them uses.
    """

    kind = "gloo"

    def __init__(self, advertise: str | None = None) -> None:
        if why := pair.usable():
            raise LinkRefused(why)
        self._advertise = advertise
        self._changed = threading.Condition()
        self._forming: dict[str, _Forming] = {}

    def prepare(self, request: pb.PrepareLinkRequest) -> pb.PrepareLinkResponse:
        if not _TOKEN.fullmatch(request.token):
            raise InvalidRequest("the token of a gloo link has 32 of the characters 0-9 and a-f")
        if not 0 < len(request.address) <= pair.MAX_ADDRESS_BYTES or not 0 < len(request.host) <= 253:
            raise InvalidRequest("a gloo link needs the address of the trainer's end, and the server's host")
        forming = _Forming()
        with self._changed:
            self._forget_unclaimed()
            if request.token in self._forming or len(self._forming) >= _MAX_UNCLAIMED:
                raise InvalidRequest("this link is being prepared already, or too many are")
            self._forming[request.token] = forming
        host = self._advertise or request.host
        threading.Thread(target=self._form, args=(forming, host, request), name="gloo", daemon=True).start()
        with self._changed:
            self._changed.wait_for(lambda: forming.address or forming.error, pair.FORM_SECONDS)
            if not forming.address:
                self._forming.pop(request.token, None)
                raise InvalidRequest(f"the server cannot listen for gloo at {host!r}: {forming.error or 'no answer'}")
        return pb.PrepareLinkResponse(address=forming.address)

    def _form(self, forming: _Forming, host: str, request: pb.PrepareLinkRequest) -> None:
        def exchange(mine: bytes, receive: object) -> None:
            with self._changed:
                forming.address = mine
                self._changed.notify_all()
            receive(request.address)  # type: ignore[operator]

        try:
            formed = Pair(pair.SERVER, host, request.token, exchange)
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
            return GlooLink(formed)

    def _forget_unclaimed(self) -> None:
        now = time.monotonic()
        for token, forming in list(self._forming.items()):
            if now - forming.begun_at > _UNCLAIMED_SECONDS:
                del self._forming[token]
