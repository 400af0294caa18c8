"""The Pull stream: chunks at one version, answered in order. How their bytes travel is the session's link's."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from protos import zero_ps_pb2 as pb
from protos.names import EMA
from protos.segment import Arena
from ps.chunk import Chunk
from ps.errors import InvalidRequest
from ps.job import Job
from ps.jobs import Jobs
from ps.links import Block, Read
from ps.monitor import Patience
from ps.newest import newest_blocks
from ps.places import Place
from ps.runs import Runs, decode_runs
from ps.sessions import Session
from ps.shard import Shard
from ps.state_access import array_of, check_travels, dtype_of, elements_of, reader
from ps.statuses import stream_error
from ps.tier import Lent
from ps.traffic import Traffic
from ps.wire import check_convertible, decode_chunks, decode_dtype, decode_staleness


def answer_pulls(
    jobs: Jobs, traffic: Traffic, requests: Iterable[pb.PullRequest], place: Place, cancelled: Callable[[], bool]
) -> Iterator[bytes | pb.PullResponse]:
    """Answers in order, with messages or the bytes of them. An error ends its own answer, not the stream.

    Every request gets at least one response, which is empty if it asked for no bytes.
    """
    for request in requests:
        with traffic.busy():
            try:
                job, session = jobs.find(request.session_id)
                place.belongs_to(session)
                patience = Patience.of(request.timeout_seconds, cancelled)
                dtype = decode_dtype(request.dtype)
                blocks: Iterator[Block | None]
                if request.staged:
                    blocks = _staged(job, session, request, dtype)
                else:
                    shard = job.open_shard()
                    chunks = decode_chunks(shard, request.chunks)
                    if request.array:
                        blocks = _arrays(job, session, shard, chunks, request, dtype, patience)
                    else:
                        check_convertible(chunks, dtype)
                        parts = list(zip(chunks, decode_runs(request.parts, chunks), strict=True))
                        oldest = max(0, request.version - decode_staleness(request))
                        blocks = _chunks(job, session, shard, parts, request.version, oldest, dtype, patience)
                for response, num_bytes in session.chosen.link.answer(request.request_id, blocks):
                    traffic.pulled(num_bytes)
                    yield response
            except Exception as error:
                yield pb.PullResponse(request_id=request.request_id, error=stream_error(error))


def _chunks(
    job: Job,
    session: Session,
    shard: Shard,
    parts: Iterable[tuple[Chunk, Runs | None]],
    version: int,
    oldest: int,
    dtype: torch.dtype | None,
    patience: Patience,
) -> Iterator[Block | None]:
    """oldest: each chunk comes in the newest version from this one to `version`."""
    if version < 0:
        raise InvalidRequest(f"there is no version {version}")
    for chunk, runs in parts:
        if chunk.version < oldest or not chunk.has_weight:
            yield None
            if oldest == version:
                job.wait_for_version(session, shard, chunk, version, patience)
            else:
                job.wait_for_any_since(session, shard, chunk, oldest, patience, version)
            job.wait_for_weight(session, shard, chunk, patience)
        job.used(session, shard, "pull", chunk, version, dtype)
        wire = dtype or chunk.dtype
        if oldest < version:
            bounds = ((0, chunk.elements),) if runs is None else runs.bounds
            yield from newest_blocks(chunk, bounds, oldest, version, wire, patience)
            continue
        for first, end in ((0, chunk.elements),) if runs is None else runs.bounds:
            offset = first * wire.itemsize
            yield Block(
                (end - first) * wire.itemsize,
                _shifted(_reader(chunk, version, wire, patience), offset),
                _lender(chunk, version, wire, patience),
                offset,
                _copier(chunk, version, wire, offset, patience),
            )


def _arrays(
    job: Job,
    session: Session,
    shard: Shard,
    chunks: Sequence[Chunk],
    request: pb.PullRequest,
    dtype: torch.dtype | None,
    patience: Patience,
) -> Iterator[Block | None]:
    """State of chunks instead of their weights."""
    version = request.version
    if request.array == EMA:
        # What is not averaged is as it is.
        array_of(shard, EMA)
        check_convertible(chunks, dtype)
    for chunk, runs in zip(chunks, decode_runs(request.parts, chunks), strict=True):
        job.wait_for_version(session, shard, chunk, version, patience)
        array = array_of(shard, request.array)
        if request.array != EMA:
            check_travels([chunk], array, dtype)
        if runs is not None and not array.per_element:
            raise InvalidRequest(f"{array.name} of {chunk.label} is one element and has no parts")
        wire = dtype or dtype_of(chunk, array)
        read = reader(chunk, array, version, wire, patience)
        for first, end in ((0, elements_of(chunk, array)),) if runs is None else runs.bounds:
            yield Block((end - first) * wire.itemsize, _shifted(read, first * wire.itemsize))


def _shifted(read: Read, offset: int) -> Read:
    return lambda start, stop, head=b"": read(offset + start, offset + stop, head)


def _reader(chunk: Chunk, version: int, dtype: torch.dtype, patience: Patience) -> Read:
    return lambda start, stop, head=b"": chunk.read(version, dtype, start, stop, patience, head)


def _copier(
    chunk: Chunk, version: int, dtype: torch.dtype, start: int, patience: Patience
) -> Callable[[torch.Tensor], None]:
    return lambda into: chunk.copy(version, dtype, start, into, patience)


def _lender(
    chunk: Chunk, version: int, dtype: torch.dtype, patience: Patience
) -> Callable[[Arena | None], Lent | None]:
    return lambda arena: chunk.lend(version, dtype, arena, patience)


def _staged(job: Job, session: Session, request: pb.PullRequest, dtype: torch.dtype | None) -> Iterator[Block]:
    staging = job.staging(session)
    for reference in request.chunks:
        yield Block(*staging.read(reference.parameter, reference.chunk, dtype))
