"""The Push stream: gradients and weights come in, straight into the memory where they will stay."""

import functools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from typing import TypeVar

import torch

from protos import zero_ps_pb2 as pb
from protos.frames import Data
from ps.chunk import Chunk, byte_view
from ps.contributions import Gradient
from ps.errors import Conflict, InvalidRequest, ServerError
from ps.job import Job
from ps.jobs import Jobs
from ps.monitor import Patience
from ps.places import Place
from ps.runs import Runs, decode_runs
from ps.sessions import Session
from ps.state_access import array_of, check_travels, dtype_of, elements_of, write_state
from ps.statuses import stream_error
from ps.tier import Incoming, Tier
from ps.traffic import Traffic
from ps.wire import check_convertible, check_gradient, decode_chunks, decode_dtype

_UPDATE_WAIT_SECONDS = 300.0
_POOL_BYTES = 64 << 20
_MAX_STAGED_CHUNK_BYTES = 1 << 34

Item = TypeVar("Item")


class BufferPool:
    """Memory of former pushes, by size. The pages of fresh memory cost as much as the bytes in it."""

    def __init__(self) -> None:
        self._free: dict[int, list[torch.Tensor]] = {}
        self._bytes = 0

    def take(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """A flat tensor with anything in it."""
        size = elements * dtype.itemsize
        free = self._free.get(size)
        if not free:
            return torch.empty(elements, dtype=dtype)
        self._bytes -= size
        return free.pop().view(dtype)

    def give(self, tensor: torch.Tensor) -> None:
        raw = tensor.reshape(-1).view(torch.uint8)
        if raw.numel() and self._bytes + raw.numel() <= _POOL_BYTES:
            self._free.setdefault(raw.numel(), []).append(raw)
            self._bytes += raw.numel()


@dataclass(frozen=True)
class _Piece:
    """Some of a push's data, which counts all at once.

    begin: memory to fill, in order, `num_bytes` together; may wait for it. finish: counts what has arrived.
    """

    num_bytes: int
    begin: Callable[[], Sequence[Incoming]]
    finish: Callable[[Sequence[Incoming]], None]


class _Arrival:
    """One header's data on its way in, piece by piece.

    A trainer may fall silent in the middle; when its session ends the memory is given back.
    """

    def __init__(
        self, request_id: int, session: Session, tier: Tier, pieces: Iterable[_Piece], max_inflight_bytes: int
    ) -> None:
        """Raises ServerFull for more bytes than the session may have on their way."""
        self.request_id = request_id
        self.session = session
        self._tier = tier
        self._pieces = deque(pieces)
        self._buffers: Sequence[Incoming] = ()
        self._views: list[memoryview] = []
        self._filled = 0
        # How many bytes have been asked a place for.
        self._claimed = 0
        self._lock = threading.Lock()
        self._abandoned = False
        self.expected_bytes = self.missing_bytes = sum(piece.num_bytes for piece in self._pieces)
        # Where memory is limited its pieces wait for their turn, and that is what limits them.
        self._inflight_bytes = 0 if tier.limited else self.expected_bytes
        session.expect(self._inflight_bytes, max_inflight_bytes)
        if tier.limited:
            session.on_end.add(self.abandon)

    def feed(self, data: bytes | memoryview | int) -> None:
        """data: the next bytes, or how many of them have come to where they were claimed.

        Raises InvalidRequest for more bytes than the header announced.
        """
        with self._lock:
            self.session.touch()
            size = data if isinstance(data, int) else len(data)
            if size > self.missing_bytes:
                raise InvalidRequest(f"a push of {self.expected_bytes} bytes was followed by more than that")
            rest = None if isinstance(data, int) else memoryview(data)
            while size:
                if not self._views:
                    self._begin()
                view = self._views[0]
                count = min(size, len(view) - self._filled)
                if rest is not None:
                    view[self._filled : self._filled + count] = rest[:count]
                    rest = rest[count:]
                self._filled += count
                size -= count
                self.missing_bytes -= count
                if self._filled == len(view):
                    del self._views[0]
                    self._filled = 0
                    if not self._views:
                        self._finish()
        if self._abandoned:
            self.abandon()

    def claim(self, size: int) -> torch.Tensor | None:
        """Where the next bytes that nobody has claimed go; None if they do not lie together, or may be given back
        before they have come: where memory is limited it is another's then."""
        with self._lock:
            if self._tier.limited or not self._pieces:
                return None
            if not self._views and not self._buffers:
                self._begin()
            start, self._claimed = self._claimed, self._claimed + size
            for buffer in self._buffers:
                if start < buffer.tensor.nbytes:
                    together = start + size <= buffer.tensor.nbytes
                    return buffer.tensor.reshape(-1).view(torch.uint8)[start : start + size] if together else None
                start -= buffer.tensor.nbytes
            return None

    def finish(self) -> None:
        """Counts what has no bytes. Expects that no bytes are missing."""
        while self._pieces:
            self._begin()
            self._finish()
        self._leave()

    def abandon(self) -> None:
        """Gives back memory of a push that does not go on. Does not wait: a `feed` that is running does it."""
        self._abandoned = True
        if self._lock.acquire(blocking=False):
            try:
                self._views.clear()
                for buffer in self._buffers:
                    self._tier.give_back(buffer)
                self._buffers = ()
            finally:
                self._lock.release()
            self._leave()

    def _leave(self) -> None:
        self.session.on_end.discard(self.abandon)
        self.session.expect(-self._inflight_bytes)
        self._inflight_bytes = 0

    def _begin(self) -> None:
        self._buffers = self._pieces[0].begin()
        self._views = [byte_view(buffer.tensor) for buffer in self._buffers if buffer.tensor.numel()]

    def _finish(self) -> None:
        self._pieces.popleft().finish(self._buffers)
        self._buffers = ()


def answer_pushes(
    jobs: Jobs,
    traffic: Traffic,
    requests: Iterable[Data | pb.PushRequest],
    place: Place,
    cancelled: Callable[[], bool],
) -> Iterator[pb.PushResponse]:
    """Acknowledges every header once its data has been counted.

    After an error the data up to the next header is passed over. A stream whose framing is lost is ended:
    InvalidRequest.
    """
    pool = BufferPool()
    incoming: _Arrival | None = None
    passing_over = False
    with ExitStack() as busy, ExitStack() as left:
        for request in requests:
            if isinstance(request, pb.PushRequest) and request.WhichOneof("part") == "header":
                if incoming is not None:
                    missing = InvalidRequest(f"the push still lacked {incoming.missing_bytes} bytes")
                    yield pb.PushResponse(request_id=incoming.request_id, error=stream_error(missing))
                    incoming.abandon()
                    incoming = None
                    busy.close()
                request_id = request.header.request_id
            elif isinstance(request, Data) and incoming is not None:
                request_id = incoming.request_id
            elif isinstance(request, Data) and passing_over:
                continue
            else:
                raise InvalidRequest("a push stream has headers, each followed by its data, and no more")
            try:
                if isinstance(request, pb.PushRequest):
                    busy.enter_context(traffic.busy())
                    passing_over = False
                    incoming = _begin(jobs, pool, request.header, place, cancelled)
                    # However the stream ends: what has arrived of a push that does not is of no use.
                    left.callback(incoming.abandon)
                    _receive(incoming, request.header, traffic)
                else:
                    assert incoming is not None
                    traffic.pushed(len(request.data))
                    incoming.feed(request.data)
                if incoming.missing_bytes:
                    continue
                incoming.finish()
                response = pb.PushResponse(request_id=request_id)
            except Exception as error:
                passing_over = True
                response = pb.PushResponse(request_id=request_id, error=stream_error(error))
                if isinstance(request, pb.PushRequest):
                    _discard(jobs, request.header, place)
            incoming = None
            left.close()
            busy.close()
            yield response


def _receive(incoming: _Arrival, header: pb.PushHeader, traffic: Traffic) -> None:
    """What of a push has come with its header, over another way than messages.

    A function of its own: a local of the stream would keep a trainer's memory from going with the trainer.
    """
    with closing(incoming.session.chosen.link.received(header, incoming.claim)) as received:
        for data in received:
            traffic.pushed(data if isinstance(data, int) else len(data))
            incoming.feed(data)


def _discard(jobs: Jobs, header: pb.PushHeader, place: Place) -> None:
    """A push was refused. What of it is on its way may not be taken for a part of the next."""
    # The trainer is told why its push was refused. A link that is of no more use says so with the next.
    with suppress(ServerError):
        _, session = jobs.find(header.session_id)
        place.belongs_to(session)
        session.chosen.link.discard(header)


def _begin(
    jobs: Jobs, pool: BufferPool, header: pb.PushHeader, place: Place, cancelled: Callable[[], bool]
) -> _Arrival:
    job, session = jobs.find(header.session_id)
    place.belongs_to(session)
    match header.kind:
        case pb.PushHeader.KIND_GRADIENT:
            pieces = _gradient(job, session, pool, header, cancelled)
        case pb.PushHeader.KIND_WEIGHT:
            pieces = _weight(job, session, header, cancelled)
        case pb.PushHeader.KIND_STATE:
            pieces = _state(job, session, header, cancelled)
        case pb.PushHeader.KIND_STAGED:
            pieces = _staged(job, session, header, cancelled)
        case _:
            raise InvalidRequest(f"there is no kind {header.kind} of push")
    return _Arrival(header.request_id, session, job.tier, pieces, job.options.max_inflight_bytes)


def _gradient(
    job: Job, session: Session, pool: BufferPool, header: pb.PushHeader, cancelled: Callable[[], bool]
) -> list[_Piece]:
    contributions = job.steps.of(session)
    shard, step = job.open_shard(), header.step
    chunks = decode_chunks(shard, header.chunks)
    dtype = check_gradient(shard, chunks, decode_dtype(header.dtype))
    parts = list(zip(chunks, decode_runs(header.parts, chunks), strict=True))
    patience = Patience.of(_UPDATE_WAIT_SECONDS, cancelled)
    # A chunk that was updated early can have a gradient of the next step before the others are done with this one.
    job.steps.catch_up(session, shard, step, patience)
    if step > shard.step:
        raise Conflict(f"a gradient of step {step} came while job {job.name!r} is at step {shard.step}")
    for chunk in chunks:
        oldest = contributions.oldest_version(chunk, step)
        if oldest == step:
            job.wait_for_version(session, shard, chunk, step, patience)
        else:
            job.wait_for_any_since(session, shard, chunk, oldest, patience, step)
        # One that is sent again may find its chunk updated.
        if chunk.version > step and contributions.check_sequence(chunk, step, header.sequence):
            raise Conflict(f"a gradient of step {step} for {chunk.label} came at version {chunk.version}")
        job.used(session, shard, "gradient", chunk, step)

    def begin(some: Sequence[tuple[Chunk, Runs | None]]) -> list[Incoming]:
        if not job.tier.limited:
            return [Incoming(pool.take(_elements(*part), dtype), None) for part in some]
        return _incoming(
            job.tier, [(_elements(*part), f"a gradient of {part[0].label}") for part in some], dtype, patience
        )

    def finish(some: Sequence[tuple[Chunk, Runs | None]], buffers: Sequence[Incoming]) -> None:
        if job.shard is not shard:
            raise Conflict(f"job {job.name!r} was restored meanwhile")
        gradients = [Gradient(*part, buffer) for part, buffer in zip(some, buffers, strict=True)]
        for spare in job.steps.add(session, contributions, step, header.sequence, gradients, final=header.final):
            if not job.tier.limited:
                pool.give(spare)

    return _pieces(job.tier, parts, [_elements(*part) * dtype.itemsize for part in parts], begin, finish)


def _elements(chunk: Chunk, runs: Runs | None) -> int:
    return chunk.elements if runs is None else runs.elements


def _weight(job: Job, session: Session, header: pb.PushHeader, cancelled: Callable[[], bool]) -> list[_Piece]:
    check_rank_0(job, session)
    shard = job.open_shard()
    chunks = decode_chunks(shard, header.chunks)
    dtype = decode_dtype(header.dtype)
    check_convertible(chunks, dtype)
    patience = Patience.of(_UPDATE_WAIT_SECONDS, cancelled)
    for chunk in chunks:
        job.wait_for_version(session, shard, chunk, header.step, patience)

    def begin(some: Sequence[Chunk]) -> list[Incoming]:
        return [
            job.tier.incoming((chunk.elements,), dtype or chunk.dtype, f"the weight of {chunk.label}", patience)
            for chunk in some
        ]

    def finish(some: Sequence[Chunk], buffers: Sequence[Incoming]) -> None:
        job.write_weights(session, shard, header.step, list(zip(some, buffers, strict=True)))

    return _pieces(job.tier, chunks, [chunk.num_bytes(dtype) for chunk in chunks], begin, finish)


def _state(job: Job, session: Session, header: pb.PushHeader, cancelled: Callable[[], bool]) -> list[_Piece]:
    check_rank_0(job, session)
    shard = job.open_shard()
    chunks = decode_chunks(shard, header.chunks)
    array = array_of(shard, header.array)
    dtype = decode_dtype(header.dtype)
    check_travels(chunks, array, dtype)
    patience = Patience.of(_UPDATE_WAIT_SECONDS, cancelled)
    for chunk in chunks:
        if not shard.manifest[chunk.parameter].has_state:
            name = shard.manifest[chunk.parameter].name
            raise InvalidRequest(f"{name!r} is not trained, so that there is no optimizer state for it")
        job.wait_for_version(session, shard, chunk, header.step, patience)

    def begin(some: Sequence[Chunk]) -> list[Incoming]:
        return [
            job.tier.incoming(
                (elements_of(chunk, array),),
                dtype or dtype_of(chunk, array),
                f"{array.name} of {chunk.label}",
                patience,
            )
            for chunk in some
        ]

    def finish(some: Sequence[Chunk], buffers: Sequence[Incoming]) -> None:
        write_state(job, session, shard, header.step, array, list(zip(some, buffers, strict=True)))

    sizes = [elements_of(chunk, array) * (dtype or dtype_of(chunk, array)).itemsize for chunk in chunks]
    return _pieces(job.tier, chunks, sizes, begin, finish)


def _staged(job: Job, session: Session, header: pb.PushHeader, cancelled: Callable[[], bool]) -> list[_Piece]:
    check_rank_0(job, session)
    staging = job.staging(session)
    dtype = decode_dtype(header.dtype)
    if dtype is None:
        raise InvalidRequest("staged data has to state its dtype")
    if len(header.chunk_bytes) != len(header.chunks):
        raise InvalidRequest(f"{len(header.chunks)} staged chunks came with {len(header.chunk_bytes)} sizes")
    for size in header.chunk_bytes:
        if size % dtype.itemsize or size > _MAX_STAGED_CHUNK_BYTES:
            raise InvalidRequest(f"a staged chunk of {dtype} cannot have {size} bytes")
    patience = Patience.of(_UPDATE_WAIT_SECONDS, cancelled)
    sized = list(zip(header.chunks, header.chunk_bytes, strict=True))

    def begin(some: Sequence[tuple[pb.ChunkRef, int]]) -> list[Incoming]:
        return _incoming(job.tier, [(size // dtype.itemsize, "a staged chunk") for _, size in some], dtype, patience)

    def finish(some: Sequence[tuple[pb.ChunkRef, int]], buffers: Sequence[Incoming]) -> None:
        session.check()
        for (reference, _), values in zip(some, buffers, strict=True):
            staging.put(reference.parameter, reference.chunk, values)

    return _pieces(job.tier, sized, list(header.chunk_bytes), begin, finish)


def _pieces(
    tier: Tier,
    items: Sequence[Item],
    sizes: Sequence[int],
    begin: Callable[[Sequence[Item]], list[Incoming]],
    finish: Callable[[Sequence[Item], Sequence[Incoming]], None],
) -> list[_Piece]:
    """A push as one piece; where memory is limited, a chunk at a time: a whole parameter may be too much."""
    groups = [[item] for item in items] if tier.limited else [list(items)]
    each = [[size] for size in sizes] if tier.limited else [list(sizes)]
    return [
        _Piece(sum(size), functools.partial(begin, group), functools.partial(finish, group))
        for group, size in zip(groups, each, strict=True)
    ]


def _incoming(tier: Tier, tensors: Iterable[tuple[int, str]], dtype: torch.dtype, patience: Patience) -> list[Incoming]:
    return [tier.incoming((elements,), dtype, what, patience) for elements, what in tensors]


def check_rank_0(job: Job, session: Session, what: str = "writes weights") -> None:
    """Raises InvalidRequest for any other session."""
    job.steps.of(session)
    if session.rank != 0:
        raise InvalidRequest(f"only rank 0 {what}, this is rank {session.rank}")
