"""Optimizer state, and the moving average of weights, as trainers read and replace it: one array at a time."""

from collections.abc import Iterable, Sequence

import torch

from protos.names import EMA
from ps import averages
from ps.chunk import Chunk
from ps.errors import Conflict, InvalidRequest, NotFound
from ps.job import Job
from ps.links import Read
from ps.monitor import Patience
from ps.sessions import Session
from ps.shard import FLUSH_SECONDS, Shard, at_liberty
from ps.store import StateArray
from ps.tier import Incoming, Part


def list_state(
    job: Job, session: Session, shard: Shard, version: int, parameters: Sequence[int], patience: Patience
) -> list[tuple[Chunk, list[tuple[str, Part]]]]:
    """What state each chunk of some parameters has, the average apart. Waits for the version; raises Conflict."""
    found = []
    for chunk in shard.select(parameters):
        job.wait_for_version(session, shard, chunk, version, patience)
        with chunk.lock:
            if chunk.version != version:
                raise Conflict(f"{chunk.label} is at version {chunk.version}, not {version}, whose state was asked for")
            arrays = [(name, part) for name, part in chunk.state.items() if part.filled and name != EMA]
        found.append((chunk, arrays))
    return found


def array_of(shard: Shard, name: str) -> StateArray:
    """What is known of a kind of state. Raises Conflict, InvalidRequest and NotFound, naming those that there are."""
    if name == EMA and shard.optimizer is None and shard.spec is not None and shard.spec.ema_decay is not None:
        return averages.ARRAY
    if shard.optimizer is None:
        raise Conflict("the job has no optimizer yet, and so no state of one; make a RemoteOptimizer first")
    array = shard.optimizer.arrays.get(name)
    if array is None and name == EMA:
        raise NotFound("the job keeps no moving average of its weights; give RemoteOptimizer an ema_decay")
    if array is None:
        known = ", ".join(sorted(shard.optimizer.arrays)) or "nothing"
        raise InvalidRequest(
            f"torch.optim.{shard.optimizer.class_name} keeps no {name[:80]!r} under its options, but {known}"
        )
    return array


def elements_of(chunk: Chunk, array: StateArray) -> int:
    """How many elements a chunk has of an array."""
    return chunk.elements if array.per_element else 1


def dtype_of(chunk: Chunk, array: StateArray) -> torch.dtype:
    return chunk.dtype if array.dtype is None else array.dtype


def check_travels(chunks: Iterable[Chunk], array: StateArray, dtype: torch.dtype | None) -> None:
    """Raises InvalidRequest unless the array can travel in a dtype."""
    for chunk in chunks:
        stored = dtype_of(chunk, array)
        if dtype is not None and dtype != stored and not (dtype.is_floating_point and stored.is_floating_point):
            raise InvalidRequest(f"{array.name} of {chunk.label} is stored as {stored} and cannot travel as {dtype}")


def reader(chunk: Chunk, array: StateArray, version: int, dtype: torch.dtype, patience: Patience) -> Read:
    """Reads ranges of bytes of a chunk's array in a dtype."""

    def read(start: int, stop: int, head: bytes = b"") -> bytes:
        with chunk.lock:
            part = chunk.state.get(array.name)
            filled = part is not None and part.filled
        if part is None or not filled:
            if array.name != EMA:
                raise NotFound(f"{chunk.label} has no {array.name} at version {version}: it was never updated")
            # Nothing was averaged yet, so that the weight is its own average.
            return chunk.read(version, dtype, start, stop, patience, head)
        return chunk.read_part(part, version, dtype, start, stop, patience, head)

    return read


def write_state(
    job: Job, session: Session, shard: Shard, step: int, array: StateArray, values: Sequence[tuple[Chunk, Incoming]]
) -> None:
    """Replaces one array of chunks that are at `step`. Raises Conflict if one is not."""
    chunks = [chunk for chunk, _ in values]
    job.commits.wait_before_change(step, Patience.of(FLUSH_SECONDS))
    with at_liberty(shard, chunks, job.shard_lock):
        _check(job, session, shard, step, chunks)
        for chunk, incoming in values:
            part = chunk.state_part(array.name, dtype_of(chunk, array), scalar=not array.per_element)
            read, fresh = ([part], []) if part.filled else ([], [part])
            with job.tier.lease(read, fresh, what=part.label), chunk.lock:
                part.hold(incoming.tensor.view(part.shape).to(part.dtype, copy=True))
                chunk.stored = None
            job.tier.give_back(incoming)


def clear_state(job: Job, session: Session, shard: Shard, step: int, parameters: Sequence[int]) -> None:
    """Discards the state of some parameters, the average apart. Raises Conflict if a chunk is not at `step`."""
    if not parameters:
        raise InvalidRequest("name the parameters whose state is to be discarded")
    chunks = shard.select(parameters)
    job.wait_at_rest(shard, session, Patience.of(FLUSH_SECONDS))
    job.commits.wait_before_change(step, Patience.of(FLUSH_SECONDS))
    with at_liberty(shard, chunks, job.shard_lock):
        _check(job, session, shard, step, chunks)
        for chunk in chunks:
            with chunk.lock:
                for name, part in chunk.state.items():
                    if name != EMA:
                        chunk.tier.empty(part)
                chunk.stored = None


def _check(job: Job, session: Session, shard: Shard, step: int, chunks: Iterable[Chunk]) -> None:
    with job.monitor:
        job.check_at(session, shard, step, chunks, "state")
        shard.generation, shard.assigned = None, True
