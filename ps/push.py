"""The Push stream: gradients and weights come in, straight into the memory where they will stay."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from protos import zero_ps_pb2 as pb
from ps.chunk import byte_view
from ps.errors import Conflict, InvalidRequest
from ps.job import Job
from ps.jobs import Jobs
from ps.monitor import Patience
from ps.sessions import Session
from ps.statuses import stream_error
from ps.traffic import Traffic
from ps.wire import check_convertible, check_gradient, decode_chunks, decode_dtype

_UPDATE_WAIT_SECONDS = 300.0
_POOL_BYTES = 64 << 20
_MAX_STAGED_CHUNK_BYTES = 1 << 34


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


@dataclass(eq=False)
class _Incoming:
    """One header's data on its way in.

    buffers: flat tensors, filled in their order. finish: counts what has arrived, all of it or nothing.
    """

    request_id: int
    session: Session
    buffers: Sequence[torch.Tensor]
    finish: Callable[[], None]

    def __post_init__(self) -> None:
        self._views = [byte_view(buffer) for buffer in self.buffers if buffer.numel()]
        self._filled = 0
        self.expected_bytes = self.missing_bytes = sum(map(len, self._views))

    def feed(self, data: bytes) -> None:
        """Raises InvalidRequest for more bytes than the header announced."""
        self.session.touch()
        if len(data) > self.missing_bytes:
            raise InvalidRequest(f"a push of {self.expected_bytes} bytes was followed by more than that")
        self.missing_bytes -= len(data)
        rest = memoryview(data)
        while rest:
            view = self._views[0]
            part = rest[: len(view) - self._filled]
            view[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            rest = rest[len(part) :]
            if self._filled == len(view):
                del self._views[0]
                self._filled = 0


def answer_pushes(
    jobs: Jobs, traffic: Traffic, requests: Iterable[pb.PushRequest], cancelled: Callable[[], bool]
) -> Iterator[pb.PushResponse]:
    """Acknowledges every header once its data has been counted.

    After an error the data up to the next header is passed over. A stream whose framing is lost is ended:
    InvalidRequest.
    """
    pool = BufferPool()
    incoming: _Incoming | None = None
    passing_over = False
    with ExitStack() as busy:
        for request in requests:
            part = request.WhichOneof("part")
            if part == "header":
                if incoming is not None:
                    missing = InvalidRequest(f"the push still lacked {incoming.missing_bytes} bytes")
                    yield pb.PushResponse(request_id=incoming.request_id, error=stream_error(missing))
                    incoming = None
                    busy.close()
                request_id = request.header.request_id
            elif part == "data" and incoming is not None:
                request_id = incoming.request_id
            elif part == "data" and passing_over:
                continue
            else:
                raise InvalidRequest("a push stream has headers, each followed by its data, and no more")
            try:
                if incoming is None:
                    busy.enter_context(traffic.busy())
                    passing_over = False
                    incoming = _begin(jobs, pool, request.header, cancelled)
                else:
                    traffic.pushed(len(request.data))
                    incoming.feed(request.data)
                if incoming.missing_bytes:
                    continue
                incoming.finish()
                response = pb.PushResponse(request_id=request_id)
            except Exception as error:
                passing_over = True
                response = pb.PushResponse(request_id=request_id, error=stream_error(error))
            incoming = None
            busy.close()
            yield response


def _begin(jobs: Jobs, pool: BufferPool, header: pb.PushHeader, cancelled: Callable[[], bool]) -> _Incoming:
    job, session = jobs.find(header.session_id)
    match header.kind:
        case pb.PushHeader.KIND_GRADIENT:
            return _gradient(job, session, pool, header, cancelled)
        case pb.PushHeader.KIND_WEIGHT:
            return _weight(job, session, header, cancelled)
        case pb.PushHeader.KIND_STAGED:
            return _staged(job, session, header)
    raise InvalidRequest(f"there is no kind {header.kind} of push")


def _gradient(
    job: Job, session: Session, pool: BufferPool, header: pb.PushHeader, cancelled: Callable[[], bool]
) -> _Incoming:
    contributions = job.steps.of(session)
    shard, step = job.open_shard(), header.step
    chunks = decode_chunks(shard, header.chunks)
    dtype = check_gradient(shard, chunks, decode_dtype(header.dtype))
    if step > shard.step:
        raise Conflict(f"a gradient of step {step} came while job {job.name!r} is at step {shard.step}")
    patience = Patience.of(_UPDATE_WAIT_SECONDS, cancelled)
    for chunk in chunks:
        job.wait_for_version(session, shard, chunk, step, patience)
        if chunk.version != step:
            raise Conflict(f"a gradient of step {step} for {chunk.label} came at version {chunk.version}")
    buffers = [pool.take(chunk.elements, dtype) for chunk in chunks]

    def finish() -> None:
        if job.shard is not shard:
            raise Conflict(f"job {job.name!r} was restored meanwhile")
        pairs = list(zip(chunks, buffers, strict=True))
        for spare in job.steps.add(session, contributions, step, header.sequence, pairs):
            pool.give(spare)

    return _Incoming(header.request_id, session, buffers, finish)


def _weight(job: Job, session: Session, header: pb.PushHeader, cancelled: Callable[[], bool]) -> _Incoming:
    _check_rank_0(job, session)
    shard = job.open_shard()
    chunks = decode_chunks(shard, header.chunks)
    dtype = decode_dtype(header.dtype)
    check_convertible(chunks, dtype)
    patience = Patience.of(_UPDATE_WAIT_SECONDS, cancelled)
    for chunk in chunks:
        job.wait_for_version(session, shard, chunk, header.step, patience)
    buffers = [torch.empty(chunk.elements, dtype=dtype or chunk.dtype) for chunk in chunks]

    def finish() -> None:
        job.write_weights(session, shard, header.step, list(zip(chunks, buffers, strict=True)))

    return _Incoming(header.request_id, session, buffers, finish)


def _staged(job: Job, session: Session, header: pb.PushHeader) -> _Incoming:
    _check_rank_0(job, session)
    staging = job.staging(session)
    dtype = decode_dtype(header.dtype)
    if dtype is None:
        raise InvalidRequest("staged data has to state its dtype")
    if len(header.chunk_bytes) != len(header.chunks):
        raise InvalidRequest(f"{len(header.chunks)} staged chunks came with {len(header.chunk_bytes)} sizes")
    buffers = []
    for size in header.chunk_bytes:
        if size % dtype.itemsize or size > _MAX_STAGED_CHUNK_BYTES:
            raise InvalidRequest(f"a staged chunk of {dtype} cannot have {size} bytes")
        buffers.append(torch.empty(size // dtype.itemsize, dtype=dtype))

    def finish() -> None:
        session.check()
        for reference, values in zip(header.chunks, buffers, strict=True):
            staging.put(reference.parameter, reference.chunk, values)

    return _Incoming(header.request_id, session, buffers, finish)


def _check_rank_0(job: Job, session: Session) -> None:
    job.steps.of(session)
    if session.rank != 0:
        raise InvalidRequest(f"only rank 0 writes weights, this is rank {session.rank}")
