"""All jobs of a server, and all sessions by their ids."""

import logging
import threading
import time
from collections import OrderedDict

from protos.names import check_job_name
from ps.budget import Budget
from ps.errors import InvalidRequest, NotFound
from ps.job import Job
from ps.monitor import Patience
from ps.options import ServerOptions
from ps.sessions import Session
from ps.store import DataDir, StoreError

MAX_JOBS = 256
"""Jobs that a server keeps in memory, so that a client that makes up names cannot fill it."""

_KEPT_SESSIONS = 4096

_log = logging.getLogger(__name__)


class Jobs:
    """The jobs of one server. Jobs stay in memory for as long as the server lives."""

    def __init__(self, options: ServerOptions, data_dir: DataDir, budget: Budget) -> None:
        self.options = options
        self.data_dir = data_dir
        self._budget = budget
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}
        # Ended sessions stay for a while: their trainers are told why they ended.
        self._sessions: OrderedDict[str, tuple[Job, Session]] = OrderedDict()
        self._closing = threading.Event()
        for name in data_dir.jobs():
            try:
                data_dir.job_store(name).clean()
            except StoreError as error:
                _log.warning("%s", error)
        self._reaper = threading.Thread(target=self._expire, name="leases", daemon=True)
        self._reaper.start()

    def open_session(
        self, name: str, rank: int, world_size: int, incarnation: str, read_only: bool, patience: Patience
    ) -> tuple[Job, Session]:
        """A session of a job, which need not exist yet."""
        job = self._job(name)
        session = job.open_session(rank, world_size, incarnation, read_only, patience)
        with self._lock:
            self._sessions[session.id] = (job, session)
            while len(self._sessions) > _KEPT_SESSIONS:
                oldest = next(iter(self._sessions))
                if self._sessions[oldest][1].ended is None:
                    self._sessions.move_to_end(oldest)
                else:
                    del self._sessions[oldest]
        return job, session

    def find(self, session_id: str) -> tuple[Job, Session]:
        """The living session of this id, its lease renewed. Raises NotFound and SessionEnded."""
        with self._lock:
            found = self._sessions.get(session_id)
        if found is None:
            raise NotFound("this server does not know the session; it was restarted since, or is another one")
        found[1].touch()
        return found

    def loaded(self) -> list[Job]:
        with self._lock:
            return sorted(self._jobs.values(), key=lambda job: job.name)

    def stored(self) -> list[tuple[str, list[int]]]:
        """Name and committed steps of the jobs that are on disk only."""
        loaded = {job.name for job in self.loaded()}
        names = [name for name in self.data_dir.jobs() if name not in loaded]
        return [(name, self.data_dir.job_store(name).committed_steps()) for name in names]

    def close(self) -> None:
        self._closing.set()
        self._reaper.join()
        for job in self.loaded():
            job.close()

    def _job(self, name: str) -> Job:
        with self._lock:
            job = self._jobs.get(name)
            if job is not None:
                return job
            if len(self._jobs) >= MAX_JOBS:
                raise InvalidRequest(f"this server has {MAX_JOBS} jobs, the most it may have")
            try:
                check_job_name(name)
                store = self.data_dir.job_store(name)
            except ValueError as error:
                raise InvalidRequest(str(error)) from error
            job = self._jobs[name] = Job(name, self.options, store, self._budget)
            return job

    def _expire(self) -> None:
        every = min(0.5, self.options.lease_seconds / 10)
        due = time.monotonic() + every
        while not self._closing.wait(every):
            # A server that was itself stopped or starved has heard nobody; that is not their fault.
            overslept = time.monotonic() - due
            for job in self.loaded():
                job.expire(max(0.0, overslept))
            due = time.monotonic() + every
