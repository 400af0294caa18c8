"""Two bidirectional streams, one for pulls and one for pushes: what all links to a server have in common.

Order, errors and the end of a connection are dealt with here.
"""

import contextlib
import itertools
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

import grpc
import torch

from protos import MESSAGE_BYTES, dtypes, frames
from protos import zero_ps_pb2 as pb
from trainer.links.base import Link, Pull, Push, PushKind, Run
from trainer.links.buffers import byte_view, fill
from trainer.links.channels import Channel, GrpcChannel
from trainer.rpc import from_stream_error
from trainer.server import Server

_PUSH_KINDS = {
    PushKind.GRADIENT: pb.PushHeader.KIND_GRADIENT,
    PushKind.WEIGHT: pb.PushHeader.KIND_WEIGHT,
    PushKind.STAGED: pb.PushHeader.KIND_STAGED,
    PushKind.STATE: pb.PushHeader.KIND_STATE,
}


_POLL_SECONDS = 0.0002


@dataclass
class PendingPull:
    """A pull whose bytes are still to come."""

    request_id: int
    destinations: Sequence[torch.Tensor]
    future: "Future[None]" = field(default_factory=Future)
    # Where the next byte goes.
    index: int = 0
    offset: int = 0

    def __post_init__(self) -> None:
        self._skip_full()

    @property
    def complete(self) -> bool:
        return self.index >= len(self.destinations)

    def receive(self, source: memoryview) -> None:
        """Scatters the bytes of a message over the destinations; they may span several of them.

        Copied with the interpreter's lock held: to give it up and wait for it takes longer than a message's bytes.
        """
        while source:
            if self.complete:
                raise ValueError(f"{len(source)} bytes more than were asked for")
            destination = self.destinations[self.index]
            count = min(len(source), destination.numel() - self.offset)
            fill(destination, self.offset, source[:count])
            source = source[count:]
            self.offset += count
            self._skip_full()

    def claim(self, size: int) -> torch.Tensor:
        """Where the next bytes go, which lie together; they count as received."""
        if self.complete or size > self.destinations[self.index].numel() - self.offset:
            raise ValueError(f"{size} bytes came together that belong to several destinations, or to none")
        target = self.destinations[self.index].narrow(0, self.offset, size)
        self.offset += size
        self._skip_full()
        return target

    def finish(self) -> None:
        # Whoever waits may look at once whether anybody still holds a view of the memory.
        self.destinations = ()
        # The end of the link may have come before, here and below.
        with contextlib.suppress(InvalidStateError):
            self.future.set_result(None)

    def fail(self, error: Exception) -> None:
        self.destinations = ()
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)

    def _skip_full(self) -> None:
        while not self.complete and self.offset == self.destinations[self.index].numel():
            self.index += 1
            self.offset = 0


class StreamLink(Link):
    """A link whose pulls and pushes are requests of the two streams.

    Bytes travel in messages here; a subclass has better ways for those that are worth it.
    """

    def __init__(self, server: Server, pulls: Channel | None = None, pushes: Channel | None = None) -> None:
        """pulls, pushes: what the streams go over; None for gRPC."""
        self.address = server.address
        self._pulls = _PullStream(self, pulls or GrpcChannel(server, "Pull"), server.session_id)
        self._pushes = _PushStream(self, pushes or GrpcChannel(server, "Push"), server.session_id)

    def pull(self, pull: Pull) -> "Future[None]":
        return self._pulls.submit(pull)

    def push(self, push: Push) -> "Future[None]":
        return self._pushes.submit(push)

    def fail(self, error: Exception) -> None:
        """The server is lost: nobody waits for it any longer."""
        self._pulls.fail(error)
        self._pushes.fail(error)

    def close(self) -> None:
        self._pulls.close()
        self._pushes.close()

    def deliver(self, response: frames.Data | pb.PullResponse, pull: PendingPull) -> None:
        """Brings what a response gives to where the pull wants it."""
        if response.data:
            pull.receive(memoryview(response.data))

    def complete(self, pull: PendingPull) -> None:
        """All responses to a pull have been delivered."""
        pull.finish()

    def refused(self, pull: PendingPull, error: Exception) -> None:
        """The server has answered a pull with an error, perhaps behind a part of it."""
        pull.fail(error)

    def acknowledged(self, request_id: int) -> None:
        """The server has a push, or refused it."""

    def abandon(self) -> None:
        """The link is at its end, of which nobody has heard yet: from here on no memory of a pull or a push is
        touched. Safe to call twice."""

    def _pack(self, push: Push, header: pb.PushHeader) -> Iterator[bytes]:
        """The messages that follow a header, as their bytes; the header is added to before this returns.

        They are asked for when it has left, perhaps from another thread.
        """
        return _messages(push.sources)


class _Stream(ABC):
    """What both directions share: a thread that reads answers, an error that ends all."""

    def __init__(self, name: str, link: StreamLink, channel: Channel, session_id: str) -> None:
        self._link = link
        self._address = link.address
        self._channel = channel
        self._session_id = session_id
        self._lock = threading.Lock()
        self._error: Exception | None = None
        self._next_id = 1
        self._reader = threading.Thread(target=self._read, name=f"{name} {link.address}", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            for message in self._channel.responses():
                self._receive(message)
            self.fail(from_stream_error(self._address, grpc.StatusCode.UNAVAILABLE, "the stream ended"))
        except Exception as error:  # a fault of ours must not leave anyone waiting
            self.fail(error)

    def _after(self, points: "Sequence[torch.cuda.Event]", messages: Iterable[bytes]) -> Iterable[bytes]:
        """The messages, once the device has come to these points.

        This thread waits, and not a stream of the device: the other end is not patient for long with a parcel that was
        announced.
        """
        return self._waited(points, messages) if points else messages

    def _waited(self, points: "Sequence[torch.cuda.Event]", messages: Iterable[bytes]) -> Iterator[bytes]:
        try:
            for point in points:
                while not point.query():  # type: ignore[no-untyped-call]
                    if self._error is not None:
                        return
                    time.sleep(_POLL_SECONDS)
        except Exception as error:  # of the device
            self.fail(error)
            return
        yield from messages

    @abstractmethod
    def _receive(self, message: bytes) -> None: ...

    @abstractmethod
    def _outstanding(self) -> "list[Future[None]]":
        """Takes every future that is not done; called with the lock held."""

    def fail(self, error: Exception) -> None:
        """Ends the stream. Everybody who waits for an answer, or will ask for one, gets this error."""
        self._link.abandon()
        with self._lock:
            self._error = self._error or error
            futures = self._outstanding()
        for future in futures:
            # Its answer may come at this moment.
            with contextlib.suppress(InvalidStateError):
                future.set_exception(error)
        self._channel.close()

    def close(self) -> None:
        self.fail(from_stream_error(self._address, grpc.StatusCode.CANCELLED, "the link was closed"))
        # What it is just writing to may be other memory soon.
        self._reader.join()


class _PullStream(_Stream):
    def __init__(self, link: StreamLink, channel: Channel, session_id: str) -> None:
        self._pending: deque[PendingPull] = deque()
        super().__init__("zero-ps pull", link, channel, session_id)

    def submit(self, pull: Pull) -> "Future[None]":
        with self._lock:
            pending = PendingPull(self._next_id, pull.destinations)
            self._next_id += 1
            if self._error is not None:
                pending.future.set_exception(self._error)
                return pending.future
            if pending.complete:
                pending.future.set_result(None)
                return pending.future
            self._pending.append(pending)
            request = pb.PullRequest(
                session_id=self._session_id,
                request_id=pending.request_id,
                version=pull.version,
                dtype=pb.DTYPE_UNSPECIFIED if pull.dtype is None else dtypes.from_torch(pull.dtype),
                chunks=[pb.ChunkRef(parameter=p, chunk=c) for p, c in pull.chunks],
                staged=pull.staged,
                array=pull.array,
                timeout_seconds=pull.timeout,
                parts=_parts(pull.runs),
                max_staleness=pull.max_staleness,
            )
            self._channel.send(self._after(pull.after, (request.SerializeToString(),)))
        return pending.future

    def _receive(self, message: bytes) -> None:
        response = frames.decode_pull(message)
        with self._lock:
            head = self._pending[0] if self._pending else None
        if head is None or head.request_id != response.request_id:
            raise ValueError(f"server {self._address} answered pull {response.request_id}, which nobody awaits")
        if isinstance(response, pb.PullResponse) and response.HasField("error"):
            self._answered(head)
            self._link.refused(head, from_stream_error(self._address, response.error.code, response.error.message))
            return
        self._link.deliver(response, head)
        if head.complete:
            self._answered(head)
            self._link.complete(head)

    def _answered(self, head: PendingPull) -> None:
        with self._lock:
            # Else the stream has failed meanwhile, and whoever waits was told.
            if self._pending and self._pending[0] is head:
                self._pending.popleft()

    def _outstanding(self) -> "list[Future[None]]":
        futures = [pending.future for pending in self._pending]
        self._pending.clear()
        return futures


class _PushStream(_Stream):
    def __init__(self, link: StreamLink, channel: Channel, session_id: str) -> None:
        self._pending: dict[int, Future[None]] = {}
        super().__init__("zero-ps push", link, channel, session_id)

    def submit(self, push: Push) -> "Future[None]":
        future: Future[None] = Future()
        failure: Exception | None = None
        with self._lock:
            if self._error is not None:
                future.set_exception(self._error)
                return future
            header = self._header(push)
            self._pending[header.request_id] = future
            try:
                messages = self._link._pack(push, header)
                request = pb.PushRequest(header=header).SerializeToString()
                self._channel.send(self._after(push.after, itertools.chain((request,), messages)))
            except Exception as error:  # a fault of ours must not leave anyone waiting
                failure = error
        if failure is not None:
            self.fail(failure)
        return future

    def _header(self, push: Push) -> pb.PushHeader:
        request_id = self._next_id
        self._next_id += 1
        return pb.PushHeader(
            session_id=self._session_id,
            request_id=request_id,
            kind=_PUSH_KINDS[push.kind],
            step=push.step,
            dtype=dtypes.from_torch(push.dtype),
            chunks=[pb.ChunkRef(parameter=p, chunk=c) for p, c in push.chunks],
            sequence=push.sequence,
            final=push.final,
            array=push.array,
            chunk_bytes=[s.numel() for s in push.sources] if push.kind is PushKind.STAGED else (),
            parts=_parts(push.runs),
        )

    def _receive(self, message: bytes) -> None:
        response = pb.PushResponse.FromString(message)
        with self._lock:
            future = self._pending.pop(response.request_id, None)
        if future is None:
            raise ValueError(f"server {self._address} answered push {response.request_id}, which nobody awaits")
        self._link.acknowledged(response.request_id)
        if response.HasField("error"):
            code = response.error.code
            future.set_exception(from_stream_error(self._address, code, response.error.message))
        else:
            future.set_result(None)

    def _outstanding(self) -> "list[Future[None]]":
        futures = list(self._pending.values())
        self._pending.clear()
        return futures


def _parts(runs: Sequence[Sequence[Run]] | None) -> list[pb.Runs]:
    return [
        pb.Runs(starts=[start for start, _ in some], counts=[stop - start for start, stop in some])
        for some in runs or ()
    ]


def _messages(sources: Sequence[torch.Tensor]) -> Iterator[bytes]:
    """`PushRequest`s with the sources' bytes back to back; small sources share one."""
    parts: list[memoryview] = []
    room = MESSAGE_BYTES
    for source in sources:
        position = 0
        while position < source.numel():
            count = min(room, source.numel() - position)
            parts.append(byte_view(source, position, count))
            position += count
            room -= count
            if room == 0:
                yield b"".join((frames.push_head(MESSAGE_BYTES), *parts))
                parts, room = [], MESSAGE_BYTES
    if parts:
        yield b"".join((frames.push_head(MESSAGE_BYTES - room), *parts))
