"""Commit and restore: a job's state in memory becomes a generation, or the other way round."""

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from protos.names import check_tag
from ps.errors import Conflict, InvalidRequest, SessionEnded, VersionGone
from ps.generations import Snapshot, check_metadata
from ps.job import Job
from ps.monitor import Patience
from ps.running_commits import RunningCommit
from ps.sessions import Session
from ps.shard import Shard
from ps.store import CommitKey, Written
from ps.working_set import check_budget

MAX_TAGS = 256

_log = logging.getLogger(__name__)


def restore(job: Job, session: Session, key: CommitKey, restore_id: str, patience: Patience) -> str:
    """Loads a generation in place of whatever is in memory; returns its metadata. On disk nothing changes.

    restore_id: the same on all servers that are brought to this state together. One that came before changes nothing:
        the call was sent again, and the state may have gone on since.

    Raises NotFound. Raises Conflict for a read-only session while there is something that others may need:
    trainers, or a state from which training can go on.
    """
    session.check()
    if job.shard is not None:
        job.wait_at_rest(job.shard, session, patience)
    with job.disk(patience), job.shard_lock:
        shard = job.shard
        if shard is not None and shard.restore_id == restore_id and shard.failure is None:
            return shard.metadata
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
    loaded = job.generations.empty_shard(key, job.tier, job.new_areas("shard"))
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


@dataclass(frozen=True)
class CommitRequest:
    """What a trainer wants committed.

    metadata: a JSON object or "". complete: a commit that every server is known to have. renew: write under
    this key also what is committed already. tag: keeps the generation; "" for none.
    """

    key: CommitKey
    metadata: str
    complete: CommitKey | None = None
    renew: bool = False
    tag: str = ""

    def check(self) -> None:
        """Raises InvalidRequest."""
        if self.complete is not None and self.complete.step > self.key.step:
            raise InvalidRequest(f"a commit of step {self.key.step} cannot follow one of step {self.complete.step}")
        check_metadata(self.metadata)
        if self.tag:
            try:
                check_tag(self.tag)
            except ValueError as error:
                raise InvalidRequest(str(error)) from None


def commit(job: Job, session: Session, request: CommitRequest, patience: Patience) -> Written:
    """Writes a generation once every chunk is at the key's step. What is committed already stays as it is.

    Returns when it is written, as does the repetition of a request that was announced.
    """
    request.check()
    job.steps.of(session)
    announced = job.commits.announced(request.key)
    if announced is not None:
        return job.commits.outcome(announced, patience)
    running = job.commits.add(request.key, patience)
    return _run(job, request, running, lambda: _write(job, session, job.open_shard(), request, running, patience))


def commit_at_rest(job: Job, shard: Shard, request: CommitRequest, patience: Patience) -> Written:
    """As `commit`, on behalf of the server itself. The shard has to be at rest at the key's step."""
    running = job.commits.add(request.key, patience)
    return _run(job, request, running, lambda: _write_now(job, lambda: None, shard, request, running, patience))


def announce(job: Job, session: Session, request: CommitRequest, patience: Patience) -> None:
    """Returns once it is certain that no update passes the commit's step before the commit has begun.

    The commit goes on in the background; `commit` with the same request waits for it.
    """
    request.check()
    job.steps.of(session)
    shard = job.open_shard()
    if shard.newest_version > request.key.step:
        raise _gone(job, shard, request.key.step)
    running = job.commits.add(request.key, patience, announced=True)
    # Nobody is there to go away: the trainer may wait for the outcome with another call, or never.
    alone = Patience.of(patience.seconds)

    def run() -> None:
        # Whoever waits is told.
        with suppress(Exception):
            _run(job, request, running, lambda: _write(job, session, shard, request, running, alone))

    threading.Thread(target=run, name=f"commit-{job.name}", daemon=True).start()


def _run(job: Job, request: CommitRequest, running: RunningCommit, write: Callable[[], Written]) -> Written:
    try:
        written = write()
    except Exception as error:
        _log.warning("job %r: the commit of %s failed: %s", job.name, request.key, error)
        job.commits.finish(running, error)
        raise
    except BaseException:
        job.commits.finish(running, Conflict("the server is stopping"))
        raise
    job.commits.finish(running, written)
    if written.key == request.key:
        _log.info("job %r: committed %s, %d bytes", job.name, written.key, written.bytes_written)
    else:
        _log.info("job %r: nothing to commit: the state in memory is that of %s", job.name, written.key)
    return written


def _write(
    job: Job, session: Session, shard: Shard, request: CommitRequest, running: RunningCommit, patience: Patience
) -> Written:
    key = request.key
    job.updater.need(shard, key.step)
    job.monitor.wait_until(
        lambda: shard.updated_step >= key.step,
        patience,
        lambda: f"step {key.step} of job {job.name!r}, which is at {shard.updated_step}",
        lambda: job.check_version(session, shard, key.step),
    )
    return _write_now(job, session.check, shard, request, running, patience)


def _write_now(
    job: Job,
    check: Callable[[], None],
    shard: Shard,
    request: CommitRequest,
    running: RunningCommit,
    patience: Patience,
) -> Written:
    """check: raises unless whoever wants the commit may have it."""
    key = request.key
    with job.disk(patience):
        committed = job.generations.committed()
        if request.tag:
            _check_tags(job, request.tag)
        snapshot = None
        with job.shard_lock:
            check()
            if job.shard is not shard:
                raise Conflict(f"job {job.name!r} was restored meanwhile")
            if any(chunk.version != key.step for chunk in shard) or shard.updated_step != key.step:
                raise _gone(job, shard, key.step)
            shard.check_weights()
            present = shard.generation
            if present is None or present not in committed or (request.renew and present != key):
                if key in committed:
                    raise Conflict(f"{key} of job {job.name!r} exists already; choose a new id for each commit")
                snapshot = job.generations.snapshot(shard, key, request.metadata, job.monitor)
                # True once it is written, unless the shard changes until then.
                shard.flush, shard.generation, shard.assigned = snapshot.flush, key, False
            job.commits.begin(running)
        bytes_written = 0
        if snapshot is not None:
            bytes_written = _flush(job, shard, snapshot, request.tag)
            shard.metadata = request.metadata
        now = key if snapshot is not None or present is None else present
        if snapshot is None and request.tag:
            job.generations.tag(now, request.tag)
        if request.complete is not None:
            job.generations.prune(request.complete, now)
        return Written(now, job.generations.path(now), bytes_written)


def _check_tags(job: Job, tag: str) -> None:
    """Raises Conflict for one tag too many: each may keep a generation on disk."""
    tags = job.generations.tags()
    if tag not in tags and len(tags) >= MAX_TAGS:
        raise Conflict(
            f"job {job.name!r} has {len(tags)} tags, the most it may have; take some away with 'zero-ps untag', or "
            "give one of them to this commit"
        )


def _flush(job: Job, shard: Shard, snapshot: Snapshot, tag: str) -> int:
    """Writes a generation while the shard changes; the bytes that were written."""
    try:
        return job.generations.write(snapshot, tag).bytes_written
    except BaseException:
        with job.shard_lock:
            if shard.generation == snapshot.header.key:
                shard.generation = None
        raise
    finally:
        shard.flush = None
        snapshot.flush.end()


def _gone(job: Job, shard: Shard, step: int) -> VersionGone:
    return VersionGone(f"step {step} of job {job.name!r} is gone: updates to step {shard.newest_version} have begun")
