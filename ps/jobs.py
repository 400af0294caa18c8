"""All jobs of a server, and all sessions by their ids."""

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from protos.names import check_job_name
from ps.assembly import Applicant
from ps.errors import InvalidRequest, Leaving, NotFound, ServerFull, SessionEnded, StorageFailed
from ps.job import Job
from ps.leaving import leave
from ps.monitor import Patience
from ps.options import ServerOptions
from ps.places import Places
from ps.sessions import Session
from ps.store import DataDir, StoreError
from ps.tier import Tier

MAX_ENDED_SESSIONS = 4096
"""Sessions that ended and are remembered, so that their trainers are told why."""

_log = logging.getLogger(__name__)


class Jobs:
    """The jobs of one server.

    A job is in memory while it has a session or a state from which training can go on. Others are on disk,
    if anything of them was committed.
    """

    def __init__(self, options: ServerOptions, data_dir: DataDir, tier: Tier) -> None:
        self.options = options
        self.data_dir = data_dir
        self.tier = tier
        self.places = Places(options.max_sessions)
        self._lock = threading.RLock()
        self._jobs: dict[str, Job] = {}
        # Names of jobs for which a session is just being opened, as often as there are such.
        self._arrivals: Counter[str] = Counter()
        # Ended sessions stay for a while: their trainers are told why they ended.
        self._sessions: OrderedDict[str, tuple[Job, Session]] = OrderedDict()
        self._closing = threading.Event()
        self._leaving = False
        try:
            data_dir.empty_working()
        except OSError as error:
            _log.warning("cannot remove what a former process left in %s: %s", data_dir.path, error)
        for name in data_dir.jobs():
            try:
                data_dir.job_store(name).clean()
            except StoreError as error:
                _log.warning("%s", error)
        self._reaper = threading.Thread(target=self._expire, name="leases", daemon=True)
        self._reaper.start()

    def open_session(
        self,
        name: str,
        rank: int,
        world_size: int,
        incarnation: str,
        read_only: bool,
        patience: Patience,
        group: int = 0,
    ) -> tuple[Job, Session]:
        """A session of a job, which for a trainer need not exist yet. Raises NotFound and ServerFull."""
        with self._arriving(name, must_exist=read_only, expected=self._is_expected(name, rank, incarnation)) as job:
            session = job.open_session(rank, world_size, incarnation, read_only, patience, group)
            with self._lock:
                self._sessions[session.id] = (job, session)
        return job, session

    def join_group(self, name: str, applicant: Applicant, patience: Patience) -> Session:
        """The session of a trainer in a group that was formed; see `Assembly.join`. Raises ServerFull."""
        with self._arriving(name, must_exist=False) as job:
            session = job.join_group(applicant, patience)
            with self._lock:
                self._sessions[session.id] = (job, session)
        return session

    def _is_expected(self, name: str, rank: int, incarnation: str) -> bool:
        """Whether a trainer has a session already, of which it was told when it joined its group."""
        with self._lock:
            job = self._jobs.get(name)
        return job is not None and job.expects(rank, incarnation)

    @contextmanager
    def _arriving(self, name: str, *, must_exist: bool, expected: bool = False) -> Iterator[Job]:
        """The job, kept in memory while somebody is about to have a session of it. expected: one that is there."""
        with self._lock:
            if self._leaving:
                raise Leaving("the server is stopping and opens no session")
            if not expected:
                self._make_room()
            job = self._job(name, must_exist)
            self._arrivals[name] += 1
        try:
            yield job
        finally:
            with self._lock:
                self._arrivals[name] -= 1
                self._arrivals += Counter()  # Drops what is zero.

    def find(self, session_id: str) -> tuple[Job, Session]:
        """The living session of this id, its lease renewed. Raises SessionEnded and RankLost."""
        with self._lock:
            found = self._sessions.get(session_id)
        if found is None:
            raise SessionEnded("this server does not know the session; it was restarted since, or is another one")
        found[1].touch()
        return found

    def peek(self, session_id: str) -> Session | None:
        """The session of this id, living or not, and its lease as it was."""
        with self._lock:
            found = self._sessions.get(session_id)
        return None if found is None else found[1]

    def loaded(self) -> list[Job]:
        with self._lock:
            return sorted(self._jobs.values(), key=lambda job: job.name)

    def stored(self) -> list[tuple[str, list[int], dict[str, int]]]:
        """Name, committed steps, and the step of each tag, of the jobs that are on disk only."""
        loaded = {job.name for job in self.loaded()}
        names = [name for name in self.data_dir.jobs() if name not in loaded]
        stores = [(name, self.data_dir.job_store(name)) for name in names]
        return [
            (name, store.committed_steps(), {tag: key.step for tag, key in store.tags().items()})
            for name, store in stores
        ]

    def held_chunks(self) -> int:
        """Chunks in memory, of all jobs."""
        return sum(len(shard) for job in self.loaded() if (shard := job.shard) is not None)

    def leave(self, boundary_seconds: float) -> None:
        """The server is about to stop: no session and no step begins any more, and what can be is committed."""
        self._leaving = True
        leave(self.loaded(), boundary_seconds)

    def close(self) -> None:
        self._closing.set()
        self._reaper.join()
        for job in self.loaded():
            job.close()

    def _make_room(self) -> None:
        """Forgets sessions that ended long ago; expects the lock to be held. Raises ServerFull."""
        ended = [id for id, (_, session) in self._sessions.items() if session.ended is not None]
        living = len(self._sessions) - len(ended) + self._arrivals.total()
        if living >= self.options.max_sessions:
            raise ServerFull(
                f"this server has {living} sessions, the most it may have; close some, use another server, or start "
                "this one with a larger --max-sessions"
            )
        for id in ended[: max(0, len(ended) - MAX_ENDED_SESSIONS)]:
            del self._sessions[id]

    def _job(self, name: str, must_exist: bool) -> Job:
        """The job, in memory; expects the lock to be held."""
        job = self._jobs.get(name)
        if job is not None:
            return job
        try:
            check_job_name(name)
            store = self.data_dir.job_store(name)
        except ValueError as error:
            raise InvalidRequest(str(error)) from error
        try:
            if must_exist and not store.committed_steps():
                raise NotFound(f"there is no job {name!r} on this server, and a read-only session cannot create it")
        except StoreError as error:
            raise StorageFailed(str(error)) from error
        if len(self._jobs) >= self.options.max_jobs:
            self._drop_idle()
        if len(self._jobs) >= self.options.max_jobs:
            raise ServerFull(
                f"this server has {len(self._jobs)} jobs in memory, the most it may have; use one of them ('zero-ps "
                "status' lists them), start another server, or start this one again, with a larger --max-jobs if it "
                "needs more: what was committed is still there then"
            )
        job = self._jobs[name] = Job(name, self.options, store, self.tier, self.held_chunks)
        return job

    def _drop_idle(self) -> None:
        """Takes jobs out of memory that have neither a session nor a usable state there."""
        with self._lock:
            for name, job in list(self._jobs.items()):
                if not self._arrivals[name] and job.retire():
                    del self._jobs[name]
                    job.close()

    def _expire(self) -> None:
        every = min(0.5, self.options.lease_seconds / 10)
        due = time.monotonic() + every
        while not self._closing.wait(every):
            # A server that was itself stopped or starved has heard nobody; that is not their fault.
            overslept = time.monotonic() - due
            for job in self.loaded():
                job.expire(max(0.0, overslept))
            self._drop_idle()
            self.places.expire()
            due = time.monotonic() + every
