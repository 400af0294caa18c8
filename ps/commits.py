"""Commit and restore: a job's state in memory becomes a generation, or the other way round."""

import logging

from ps.errors import Conflict, InvalidRequest, SessionEnded, VersionGone
from ps.generations import check_metadata
from ps.job import Job
from ps.monitor import Patience
from ps.sessions import Session
from ps.shard import Shard
from ps.store import CommitKey, Written
from ps.working_set import check_budget

_log = logging.getLogger(__name__)


def restore(job: Job, session: Session, key: CommitKey, restore_id: str, patience: Patience) -> str:
    """Loads a generation in place of whatever is in memory; returns its metadata. On disk nothing changes.

    restore_id: the same on all servers that are brought to this state together.

    Raises NotFound. Raises Conflict for a read-only session while there is something that others may need:
    trainers, or a state from which training can go on.
    """
    session.check()
    if job.shard is not None:
        job.wait_at_rest(job.shard, session, patience)
    with job.shard_lock:
        shard = job.shard
        if shard is not None and (shard.generation != key or shard.failure is not None):
            shard = None
        if session.read_only:
            if shard is not None:
                # Memory is what the generation is. It stays of the restore that trainers know it by.
                return shard.metadata
            _check_unused(job, key.step)
        if shard is None:
            shard = _load(job, session, key)
        with job.monitor:
            # A newer trainer may have found the job without state meanwhile; then that is how it stays.
            try:
                session.check()
            except SessionEnded:
                if shard is not job.shard:
                    shard.close()
                raise
            job.shard = shard
            shard.restore_id = restore_id
            job.steps.reset()
            job.monitor.changed()
        _log.info("job %r: restored %s", job.name, key)
        return shard.metadata


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


def _load(job: Job, session: Session, key: CommitKey) -> Shard:
    loaded = job.generations.empty_shard(key, job.tier, job.new_area("shard"))
    # The old state leaves first: memory need not hold both.
    with job.monitor:
        session.check()
        job.drop_shard()
        job.monitor.changed()
    try:
        check_budget(loaded, 0 if session.read_only else session.world_size, {})
        job.generations.read_into(loaded, key)
    except BaseException:
        loaded.close()
        raise
    return loaded


def commit(
    job: Job,
    session: Session,
    key: CommitKey,
    metadata: str,
    complete: CommitKey | None,
    renew: bool,
    patience: Patience,
) -> Written:
    """Writes a generation once every chunk is at the key's step. What is committed already stays as it is.

    metadata: a JSON object or "". complete: a commit that every server is known to have. renew: write under
    this key also what is committed already.
    """
    step = key.step
    if complete is not None and complete.step > step:
        raise InvalidRequest(f"a commit of step {step} cannot follow one of step {complete.step}")
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
        written = job.generations.write(shard, key, metadata, complete, renew)
    _log.info("job %r: committed %s, %d bytes", job.name, written.key, written.bytes_written)
    return written
