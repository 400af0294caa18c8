"""The link within one host: trainers read chunks where they are, and the server reads gradients where they are."""

import contextlib
import hashlib
import logging
import os
import selectors
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence

from protos import local_messages, rendezvous
from protos import zero_ps_pb2 as pb
from protos.segment import Arena, Segment
from ps.errors import Cancelled, InvalidRequest
from ps.links.base import Answer, Block, Claim, Link, LinkKind, LinkRefused
from ps.links.grpc import messages
from ps.links.local_stream import LocalStream
from ps.rarely import Rarely
from ps.tier import Lent

_INLINE_BYTES = 32 << 10
"""What is smaller costs less as a part of a message than to be lent."""

_COPIED_BYTES = 8 << 20
"""What does not stay in memory is lent as a copy: so much of it to one trainer at a time, and the rest in messages."""

_RESPONSE_BYTES = 4 << 20
"""A trainer begins to copy so much while the server makes the next ready."""

_HANDSHAKE_SECONDS = 2.0

_UNCLAIMED_SECONDS = 60.0
_MAX_UNCLAIMED = 256
"""Connections that no session has claimed: for how long, and how many, of which the oldest go first."""

_LOOK_SECONDS = 5.0
_AFTER_FAILURE_SECONDS = 0.05

_log = logging.getLogger(__name__)


class ShmLink(Link):
    """Lends memory to one trainer, and takes it back as the trainer has read it, or is gone.

    segment: the trainer's.
    """

    kind = "shm"

    def __init__(
        self, arena: Arena, connection: socket.socket, segment: Segment, streams: Sequence[LocalStream]
    ) -> None:
        self._arena = arena
        self._connection = connection
        self._segment: Segment | None = segment
        self._lock = threading.Lock()
        # In the order in which the trainer reads them.
        self._lent: deque[Lent] = deque()
        self._copies: weakref.WeakSet[Lent] = weakref.WeakSet()
        self._read = 0
        self._closed = False
        self._streams = streams

    def serve(self, pulls: Answer, pushes: Answer) -> None:
        for stream, answer in zip(self._streams, (pulls, pushes), strict=True):
            stream.serve(answer)

    def answer(self, request_id: int, blocks: Iterable[Block | None]) -> Iterator[tuple[bytes | pb.PullResponse, int]]:
        """Lends what is large, where it is or as a copy; the rest travels in messages."""
        regions: list[tuple[pb.Region, Lent]] = []
        small: list[Block] = []
        sent = False
        try:
            for block in blocks:
                region = None if block is None or block.num_bytes < _INLINE_BYTES else self._lend(block)
                if region is not None:
                    regions.append(region)
                # What came before goes before.
                if small and (block is None or region is not None):
                    yield from messages(request_id, small)
                    small, sent = [], True
                if regions and (region is None or sum(r.size for r, _ in regions) >= _RESPONSE_BYTES):
                    yield self._handed_over(request_id, regions)
                    sent = True
                if block is not None and region is None:
                    small.append(block)
            if regions:
                yield self._handed_over(request_id, regions)
            elif small or not sent:
                yield from messages(request_id, small)
        finally:
            for _, lent in regions:
                lent.give_back()

    def _lend(self, block: Block) -> tuple[pb.Region, Lent] | None:
        try:
            lent, start = block.lend(self._arena), block.start
            if lent is None:
                lent, start = self._copied(block), 0
        except MemoryError as error:
            _log.warning("a chunk travels in messages: %s", error)
            return None
        if lent is None:
            return None
        offset = self._arena.offset_of(lent.tensor)
        assert offset is not None
        return pb.Region(offset=offset + start, size=block.num_bytes), lent

    def _copied(self, block: Block) -> Lent | None:
        """A copy of what may leave memory, for this trainer alone; None where it has enough of them."""
        taken = sum(lent.tensor.nbytes for lent in self._copies)
        if block.copy is None or taken + block.num_bytes > _COPIED_BYTES:
            return None
        lent = Lent(self._arena.take(block.num_bytes))
        block.copy(lent.tensor)
        lent.lend()
        self._copies.add(lent)
        return lent

    def _handed_over(self, request_id: int, regions: list[tuple[pb.Region, Lent]]) -> tuple[pb.PullResponse, int]:
        """The response that tells the trainer of regions, which are its own until it says that it has read them."""
        with self._lock:
            if self._closed:
                raise Cancelled("the trainer has left the link")
            self._lent.extend(lent for _, lent in regions)
        response = pb.PullResponse(request_id=request_id, regions=[region for region, _ in regions])
        regions.clear()
        return response, sum(region.size for region in response.regions)

    def read_so_far(self, count: int) -> None:
        """The trainer has read so many regions since the beginning. Raises ValueError for too many."""
        with self._lock:
            if not self._read <= count <= self._read + len(self._lent):
                raise ValueError(f"{count} regions cannot have been read")
            while self._read < count:
                self._lent.popleft().give_back()
                self._read += 1

    def received(self, header: pb.PushHeader, claim: Claim) -> Generator[memoryview | int, None, None]:
        for region in header.regions:
            segment = self._segment
            if segment is None:
                raise Cancelled("the trainer has left the link")
            try:
                data = segment.tensor(region.offset, region.size)
            except ValueError as error:
                raise InvalidRequest(f"a push names memory that the trainer does not share: {error}") from None
            yield data.numpy().data

    def close(self) -> None:
        # First of all: a trainer that reads on and is then told nothing would take what it read for good.
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._closed = True
            while self._lent:
                self._lent.popleft().give_back()
        # Ended sessions are remembered for long.
        self._segment = None
        for stream in self._streams:
            stream.end_unserved()


class _Connection:
    """A trainer's end of the socket. key: of its token. link: once its session is open."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.since = time.monotonic()
        self.key = b""
        # Its segment, which is not looked at before a session has claimed it.
        self.fd = -1
        self.link: ShmLink | None = None

    def take_fd(self) -> int:
        fd, self.fd = self.fd, -1
        return fd


class ShmKind(LinkKind):
    """The server's memory and the socket over which trainers are given it; one thread listens to all of them."""

    kind = "shm"

    def __init__(self) -> None:
        """Raises LinkRefused where the system has no such memory or sockets."""
        try:
            self._arena = Arena()
            self._listener, self._address = rendezvous.listen()
        except (OSError, AttributeError) as error:
            raise LinkRefused(f"the server cannot share memory: {error}") from error
        self._closed = False
        self._changed = threading.Condition()
        # By key: trainers that have not opened their session yet.
        self._waiting: dict[bytes, _Connection] = {}
        # Those that no session has claimed, the oldest first. Only the listening thread uses it.
        self._unclaimed: dict[_Connection, None] = {}
        self._refusals = Rarely(_log, "refused %d connections to the socket of shm links, the last: %s")
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._listen, name="shm", daemon=True)
        self._thread.start()

    def listening(self) -> pb.ServerLink:
        return pb.ServerLink(kind=self.kind, address=self._address)

    def accept(self, offer: pb.LinkOffer) -> Link:
        key = _key(offer.token)
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._waiting, _HANDSHAKE_SECONDS):
                raise LinkRefused("the trainer did not come to the server's socket")
            connection = self._waiting.pop(key)
            try:
                segment = Segment(connection.take_fd())
            except (OSError, ValueError) as error:
                raise LinkRefused(f"the server cannot use the trainer's memory: {error}") from None
            try:
                pulls, pushes = local_messages.pair(), local_messages.pair()
            except OSError as error:
                raise LinkRefused(f"the server could not make the link's streams: {error}") from error
            streams = (LocalStream("pull", pulls[0]), LocalStream("push", pushes[0]))
            link = connection.link = ShmLink(self._arena, connection.socket, segment, streams)
        with pulls[1], pushes[1]:
            try:
                rendezvous.send_files(connection.socket, "link", self._arena.fd, pulls[1].fileno(), pushes[1].fileno())
            except OSError as error:
                link.close()
                raise LinkRefused(f"the server could not hand over its memory: {error}") from error
        return link

    def close(self) -> None:
        self._closed = True
        # Wakes the thread.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def _listen(self) -> None:
        due = time.monotonic() + _LOOK_SECONDS
        while not self._closed:
            for key, _ in self._selector.select(_LOOK_SECONDS):
                if key.data is None:
                    self._welcome()
                else:
                    self._hear(key.data)
            if time.monotonic() >= due or len(self._unclaimed) > _MAX_UNCLAIMED:
                self._end_unclaimed()
                due = time.monotonic() + _LOOK_SECONDS
        for key in list(self._selector.get_map().values()):
            if key.data is not None:
                self._end(key.data)
        self._selector.close()
        self._listener.close()

    def _welcome(self) -> None:
        connection = None
        try:
            connection, _ = self._listener.accept()
            connection.settimeout(_HANDSHAKE_SECONDS)
            rendezvous.check_peer(connection)
            heard = _Connection(connection)
            self._selector.register(connection, selectors.EVENT_READ, heard)
            self._unclaimed[heard] = None
        except OSError as error:
            if not self._closed:
                self._refusals.warn(error)
            if connection is not None:
                connection.close()
            else:
                # There is no way to take it, and it would be announced again at once.
                time.sleep(_AFTER_FAILURE_SECONDS)

    def _end_unclaimed(self) -> None:
        """Ends connections that nobody needs: they waited too long, or are too many."""
        for connection in list(self._unclaimed):
            if connection.link is not None:
                del self._unclaimed[connection]
        old = time.monotonic() - _UNCLAIMED_SECONDS
        for connection in list(self._unclaimed):
            if connection.since > old and len(self._unclaimed) <= _MAX_UNCLAIMED:
                break
            with self._changed:
                # A session may come for it just now.
                if connection.link is not None:
                    continue
                self._waiting.pop(connection.key, None)
            self._refusals.warn("no session claimed it")
            self._end(connection)

    def _hear(self, connection: _Connection) -> None:
        try:
            if connection.link is not None:
                packet = connection.socket.recv(64)
                if not packet:
                    raise OSError("the trainer has left")
                connection.link.read_so_far(rendezvous.decode_count(packet))
                return
            token, (fd,) = rendezvous.receive_files(connection.socket, 1)
            with self._changed:
                if connection.key or not token or _key(token) in self._waiting:
                    os.close(fd)
                    raise ValueError("a second greeting")
                connection.key, connection.fd = _key(token), fd
                self._waiting[connection.key] = connection
                self._changed.notify_all()
        except (OSError, ValueError) as error:
            if not isinstance(error, OSError):
                self._refusals.warn(error)
            self._end(connection)

    def _end(self, connection: _Connection) -> None:
        self._selector.unregister(connection.socket)
        self._unclaimed.pop(connection, None)
        with self._changed:
            if self._waiting.get(connection.key) is connection:
                del self._waiting[connection.key]
            fd = connection.take_fd()
        if fd >= 0:
            os.close(fd)
        if connection.link is not None:
            connection.link.close()
        connection.socket.close()


def _key(token: str) -> bytes:
    """By which a token is looked up: how long that takes tells nothing of the token."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
