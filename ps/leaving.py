"""What a server that was told to stop does for its jobs: it commits those that are at a step boundary.

Servers that stop together do this each on its own. Their generations are one commit all the same, as the commit's id
follows from what they share.
"""

import hashlib
import json
import logging
import threading
from collections.abc import Iterable

from ps.commits import CommitRequest, commit_at_rest
from ps.errors import ServerError, VersionGone
from ps.job import Job
from ps.monitor import Patience
from ps.shard import Shard
from ps.store import CommitKey

_WRITE_SECONDS = 3600.0
"""A disk that is only slow is waited for; who cannot wait sends a second signal."""

_log = logging.getLogger(__name__)


def leave(jobs: Iterable[Job], boundary_seconds: float) -> None:
    """No job begins another step; each is committed if it gets to the end of the present one in so many seconds."""
    threads = [
        threading.Thread(target=_leave, args=(job, boundary_seconds), name=f"leave-{job.name}", daemon=True)
        for job in jobs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def commit_id(job: str, shard: Shard) -> str:
    """The same on every server that stops at this step, and of no other state.

    A restore has an id that no other one has, and between two restores a run comes to each step once.
    """
    shared = [job, shard.restore_id, shard.step, shard.metadata]
    return hashlib.sha256(json.dumps(shared).encode()).hexdigest()[:32]


def _leave(job: Job, boundary_seconds: float) -> None:
    job.leave()
    patience = Patience.of(boundary_seconds)
    try:
        while True:
            shard = job.shard
            if shard is None:
                return
            job.wait_for_boundary(shard, patience)
            if why := _why_not(job, shard):
                _log.warning("job %r is not committed: %s", job.name, why)
                return
            request = CommitRequest(CommitKey(shard.step, commit_id(job.name, shard)), shard.metadata)
            try:
                commit_at_rest(job, shard, request, Patience.of(_WRITE_SECONDS))
                return
            except VersionGone:
                # A step that was asked for just before has begun meanwhile.
                continue
    except ServerError as error:
        _log.warning("job %r is not committed: %s", job.name, error)
    except Exception:
        _log.exception("job %r is not committed", job.name)


def _why_not(job: Job, shard: Shard) -> str:
    """Why there is nothing that could be committed, or ""."""
    if shard.failure is not None:
        return shard.failure
    if shard.missing_weights():
        return "it has not got all its weights yet"
    if not shard.at_rest:
        return f"step {shard.newest_version - 1} is half done, and its trainers did not complete it in time"
    if shard.assigned:
        return "a trainer has assigned weights or state since the last step or commit, and may not have assigned all"
    return ""
