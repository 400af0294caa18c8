"""Commit and restore: a job's state in memory becomes a generation, or the other way round."""

import logging

from ps.errors import Conflict, VersionGone
from ps.generations import check_metadata
from ps.job import Job
from ps.monitor import Patience
from ps.opening import reserve
from ps.sessions import Session
from ps.store import Written

_log = logging.getLogger(__name__)


def restore(job: Job, session: Session, step: int, patience: Patience) -> str:
    """Loads a generation in place of whatever is in memory; returns its metadata. Raises NotFound.

    Raises Conflict for a read-only session while there is something that others may need: trainers, or a
    state from which training can go on.
    """
    session.check()
    if job.shard is not None:
        job.wait_at_rest(job.shard, session, patience)
    with job.shard_lock:
        if session.read_only:
            if not _holds(job, step):
                _check_unused(job, step)
                _load(job, step, 0)
            return job.open_shard().metadata
        if not _holds(job, step):
            _load(job, step, session.world_size)
        with job.monitor:
            session.check()
            job.steps.reset()
            job.monitor.changed()
        _log.info("job %r: restored step %d", job.name, step)
        return job.open_shard().metadata


def _holds(job: Job, step: int) -> bool:
    """Whether memory is what the generation is."""
    return job.shard is not None and job.shard.generation == step and job.shard.failure is None


def _check_unused(job: Job, step: int) -> None:
    if trainers := [session.who for session in job.living_sessions() if not session.read_only]:
        raise Conflict(
            f"a read-only session cannot restore step {step} of job {job.name!r} while it has trainers "
            f"({trainers[0]}); wait until they have it in memory"
        )
    if job.usable_step >= 0:
        raise Conflict(
            f"a read-only session cannot restore step {step} of job {job.name!r}, which has step {job.usable_step} in "
            "memory; have a trainer restore it"
        )


def _load(job: Job, step: int, world_size: int) -> None:
    loaded = job.generations.empty_shard(step)
    reserve(job, loaded, world_size, 0.0)
    # The old state leaves first: memory need not hold both.
    with job.monitor:
        job.shard = None
        job.monitor.changed()
    job.generations.read_into(loaded, step)
    job.shard = loaded


def commit(job: Job, session: Session, step: int, metadata: str, complete_step: int, patience: Patience) -> Written:
    """Writes a generation once every chunk is at `step`. Committing a step again changes nothing.

    metadata: a JSON object or "". complete_step: a step that every server is known to have committed.
    """
    check_metadata(metadata)
    job.steps.of(session)
    shard = job.open_shard()
    job.monitor.wait_until(
        lambda: shard.updated_step >= step,
        patience,
        lambda: f"step {step} of job {job.name!r}, which is at {shard.updated_step}",
        lambda: job.check_version(session, shard, step),
    )
    with job.shard_lock:
        session.check()
        if job.shard is not shard:
            raise Conflict(f"job {job.name!r} was restored meanwhile")
        if any(chunk.version != step for chunk in shard) or shard.updated_step != step:
            raise VersionGone(f"step {step} of job {job.name!r} is gone: updates to step {shard.step} have begun")
        shard.check_weights()
        written = job.generations.write(shard, step, metadata, complete_step)
    _log.info("job %r: committed step %d, %d bytes", job.name, step, written.bytes_written)
    return written
