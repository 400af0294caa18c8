"""Opening a job: the manifest is created or compared, staged weights find their place, an optimizer is set."""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from protos.layout import ChunkGrid, place_all
from protos.names import EMA
from ps.averages import drop_averages
from ps.chunk import Chunk
from ps.contributions import Terms
from ps.errors import Conflict, InvalidRequest, ServerFull, SessionEnded
from ps.job import Job
from ps.monitor import Patience
from ps.optimizer import ChunkOptimizer
from ps.sessions import Session
from ps.shard import Shard, check_same_model
from ps.staging import Staging
from ps.store import OptimizerSpec, StoredParameter
from ps.tier import Part
from ps.working_set import check_budget

MAX_CHUNKS = 1 << 18
"""Of all jobs on one server. The Python objects of so many take 1.8 GB."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedJob:
    """What a trainer is told about the job that it opened."""

    manifest: tuple[StoredParameter, ...]
    needs_weights: bool
    bound: tuple[Chunk, ...]
    step: int
    placement_digest: str


def open_job(
    job: Job, session: Session, manifest: Sequence[StoredParameter], staging_ids: Mapping[str, int]
) -> OpenedJob:
    """Creates the job, or checks that it holds this model. Takes over chunks that were staged for it.

    A read-only session only compares. staging_ids: by parameter name. Raises Conflict naming the first
    parameter that differs.
    """
    with job.shard_lock:
        with job.monitor:
            session.check()
            if session.read_only:
                return _compare(job, manifest)
            shard = job.shard
            if shard is not None and shard.failure is not None and shard.failed_at < session.opened_at:
                job.drop_shard()
                shard = None
            created = shard is None
            if shard is not None:
                job.open_shard()
                check_same_model(job.name, shard.manifest, manifest)
                shard.set_trainable(manifest)
        if shard is None:
            shard = _create(job, session, manifest)
        needs_weights = created or shard.missing_weights() > 0
        if not needs_weights and len(shard):
            job.staging(session).clear()
        bound = [_move(job, session, part, chunk) for part, chunk in _staged(job.staging(session), shard, staging_ids)]
        job.monitor.changed()
        return OpenedJob(shard.manifest, needs_weights, tuple(bound), shard.step, shard.placement_digest)


def _compare(job: Job, manifest: Sequence[StoredParameter]) -> OpenedJob:
    if job.shard is None:
        raise Conflict(
            f"job {job.name!r} has no state on this server, and a read-only session cannot create it; wait for its "
            "trainers to open it"
        )
    shard = job.open_shard()
    check_same_model(job.name, shard.manifest, manifest)
    # Weights that rank 0 has still to write are not for a reader to send: its pulls wait for them.
    return OpenedJob(shard.manifest, False, (), shard.step, shard.placement_digest)


def _create(job: Job, session: Session, manifest: Sequence[StoredParameter]) -> Shard:
    if steps := job.generations.steps():
        raise Conflict(
            f"job {job.name!r} has committed steps on shard {job.options.index} ({_list(steps)}) and none of "
            "them was restored; restore one, or move the job's folder away to begin anew"
        )
    _check_chunks(job, manifest)
    shard = Shard(job.options.index, job.options.num_shards, manifest, 0, job.tier, job.new_areas("shard"))
    check_budget(shard, session.world_size, {})
    with job.monitor:
        try:
            session.check()
        except SessionEnded:
            shard.close()
            raise
        job.shard = shard
    shard.assigned = True
    _log.info("job %r: created, %d parameters, %d chunks here", job.name, len(manifest), len(shard))
    return shard


def _check_chunks(job: Job, manifest: Sequence[StoredParameter]) -> None:
    """Raises ServerFull for more chunks than this server may have: each takes memory besides its weight."""
    room = MAX_CHUNKS - job.held_chunks()
    if sum(ChunkGrid.of(p.shape).num_chunks for p in manifest) <= room:
        return
    placement = place_all((p.shape for p in manifest), job.options.num_shards)
    here = sum(shards.count(job.options.index) for shards in placement)
    if here > room:
        raise ServerFull(
            f"job {job.name!r} would have {here} chunks on this server, which has room for {max(0, room)} of "
            f"{MAX_CHUNKS}; use more servers, or fewer and larger parameters"
        )


def _staged(staging: Staging, shard: Shard, staging_ids: Mapping[str, int]) -> Iterator[tuple[Part, Chunk]]:
    """What was staged for chunks that have no weight yet."""
    for chunk in shard:
        staging_id = staging_ids.get(shard.manifest[chunk.parameter].name)
        if staging_id is None or chunk.has_weight:
            continue
        values = staging.take(staging_id, chunk)
        if values is not None:
            yield values, chunk


def _move(job: Job, session: Session, staged: Part, chunk: Chunk) -> Chunk:
    """Makes a staged part the chunk's weight."""
    tier = job.tier
    if staged.dtype == chunk.dtype:
        with job.monitor, chunk.lock:
            session.check()
            tier.move(staged, chunk.weight)
        return chunk
    with tier.lease([staged], [chunk.weight]), job.monitor, chunk.lock:
        session.check()
        chunk.write(staged.tensor)
    tier.discard([staged])
    return chunk


def set_optimizer(
    job: Job,
    session: Session,
    spec: OptimizerSpec,
    patience: Patience,
    trained: Sequence[int] = (),
    reduction: Literal["mean", "sum"] = "mean",
    max_staleness: int = 0,
    kept_rows: Collection[int] = (),
) -> None:
    """States the optimizer, and which of its parameters take gradients by now.

    Groups may change, the class may not. Raises Conflict, InvalidRequest.
    """
    shard = job.open_shard()
    # A trainer that gave its word for a step and is ahead of the others changes the optimizer of the next one.
    job.steps.catch_up(session, shard, job.steps.of(session).stepped + 1, patience)
    job.wait_at_rest(shard, session, patience)
    # Outside the locks: the first optimizer of a process takes a second or two.
    optimizer = ChunkOptimizer(spec, len(shard.manifest))
    for parameter in optimizer.group_of:
        if shard.manifest[parameter].kind != "parameter":
            raise InvalidRequest(f"buffer {shard.manifest[parameter].name!r} cannot be optimized")
    for parameter in trained:
        if parameter not in optimizer.group_of:
            raise InvalidRequest(f"parameter {parameter} cannot be trained: it is in no group")
    for parameter in kept_rows:
        if parameter not in optimizer.group_of or not shard.manifest[parameter].shape:
            raise InvalidRequest(f"rows of parameter {parameter} cannot be kept: it has none, or is in no group")
    job.steps.agree_on(session, Terms(reduction, spec.ema_decay, max_staleness, frozenset(kept_rows)))
    with job.shard_lock:
        if job.shard is shard:
            shard.set_trained(trained)
            check_budget(shard, session.world_size, optimizer.arrays, optimizer.fused, max_staleness, kept_rows)
        _set_optimizer(job, session, shard, spec, optimizer)


def _set_optimizer(job: Job, session: Session, shard: Shard, spec: OptimizerSpec, optimizer: ChunkOptimizer) -> None:
    with job.monitor:
        job.steps.of(session)
        if job.shard is not shard:
            raise Conflict(f"job {job.name!r} was restored meanwhile")
        if shard.spec is not None and shard.spec.class_name != spec.class_name:
            raise Conflict(
                f"job {job.name!r} was trained with torch.optim.{shard.spec.class_name} and cannot go on with "
                f"{spec.class_name}; use the same class, or another job name"
            )
        if shard.optimizer is not None and shard.spec == spec:
            return
        job.steps.check_none_announced()
        if shard.optimizer is not None:
            optimizer.arrays = {**shard.optimizer.arrays, **optimizer.arrays}
        if spec.ema_decay is None:
            optimizer.arrays.pop(EMA, None)
            if drop_averages(shard):
                shard.generation = None
        shard.spec, shard.optimizer = spec, optimizer


def _list(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps[-5:]))
