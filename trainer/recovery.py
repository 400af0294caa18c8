"""Joining a job, and joining it again when servers or other trainers were lost."""

import contextlib
import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from trainer.connection import open_connection
from trainer.errors import (
    ConfigError,
    ConnectError,
    DeadlineExceeded,
    NoCommonState,
    ServerLost,
    SessionLost,
    StepHalfDone,
    TokenUnknown,
    TrainerLost,
    VersionGone,
    ZeroPsError,
)
from trainer.resume import resume

if TYPE_CHECKING:
    from trainer.job import Job

_MENDABLE = (ConnectError, TrainerLost, SessionLost, StepHalfDone, DeadlineExceeded, TokenUnknown)
"""What joining anew may mend. A server's failure (its disk, an update) would only come again."""

_TRANSIENT = (ServerLost, TrainerLost, SessionLost)
"""What may happen while joining, and be otherwise the next time. Once a trainer was connected its token is waited for,
too: it was good, and is exchanged, or will be put back."""

_IN_VAIN = 20
"""How often in a row a step may fail and be recovered without one being completed."""

_FIRST_DELAY_SECONDS, _LONGEST_DELAY_SECONDS = 0.05, 2.0

_log = logging.getLogger(__name__)


def connected(job: "Job", timeout: float) -> "Job":
    """The job, joined for the first time; timeout: seconds for servers to answer and for all ranks to arrive."""
    try:
        _join(job, timeout)
    except BaseException:
        if hasattr(job, "connection"):
            job.connection.close()
        raise
    return job


def recover(job: "Job", timeout: float | None = None, *, at_boundary: bool = False) -> int:
    """See `Job.recover`. at_boundary: nothing is under way, and the others are still to come to this step."""
    job.check_open()
    if job.model is not None and job.model.group is not None:
        raise ConfigError(
            "trainers in group mode cannot join anew one by one: their process group ends with any of them; start all "
            "of them again, as torchrun does"
        )
    if not at_boundary:
        job.connection.abandon("it has begun to recover")
    _join(job, job.timeout if timeout is None else timeout, at_boundary=at_boundary)
    return job.step


def _join(job: "Job", timeout: float, *, at_boundary: bool = False) -> None:
    """Connects and resumes, over and over until it succeeds or the time is up."""
    end = time.monotonic() + timeout
    delay = _FIRST_DELAY_SECONDS
    transient = (*_TRANSIENT, TokenUnknown) if hasattr(job, "connection") else _TRANSIENT
    while True:
        try:
            _join_once(job, max(0.1, end - time.monotonic()), at_boundary=at_boundary)
            return
        except transient as error:
            # With jitter: trainers that failed together are not to come together, over and over.
            pause = delay * random.uniform(0.5, 1.5)
            if time.monotonic() + pause >= end:
                raise
            _log.info("job %r: cannot join yet: %s", job.name, error)
            at_boundary = False
            delay = min(2 * delay, _LONGEST_DELAY_SECONDS)
            time.sleep(pause)


def _join_once(job: "Job", timeout: float, *, at_boundary: bool) -> None:
    before = getattr(job, "connection", None)
    connection = open_connection(job.wish, before and before.place, timeout, keep_session=at_boundary)
    if before is not None:
        before.drop()
    job.adopt(connection)
    try:
        resume(job, job.timeout)
        if job.model is not None:
            if not job.exists:
                raise NoCommonState(
                    f"the servers were started anew and nothing of job {job.name!r} was committed, so that what was "
                    "trained is lost; start the trainers again to begin anew"
                )
            job.model.reopen()
    except (*_TRANSIENT, TokenUnknown) as error:
        connection.abandon(f"it could not join: {error}")
        raise
    except BaseException:
        connection.close()
        raise


@contextlib.contextmanager
def recovering(
    job: "Job",
    on_rewind: Callable[[int], None] | None,
    on_lost: Callable[[ZeroPsError], None] | None,
    timeout: float | None,
) -> Iterator[None]:
    """See `Job.recovering`."""
    job.check_open()
    expected = job.step
    try:
        if 0 < job.regroup_at <= job.step:
            recover(job, timeout, at_boundary=True)
            _rewound(job, expected, on_rewind)
        expected = job.step + 1
        job.buffers_before.keep(job)
        yield
    except (*_MENDABLE, VersionGone) as error:
        job.check_open()
        if isinstance(error, VersionGone) and not job.read_only:
            raise
        if job.step > job.recovered_at:
            job.failures = 0
        if (job.model is not None and job.model.group is not None) or job.failures >= _IN_VAIN:
            raise
        job.failures += 1
        if on_lost is not None:
            on_lost(error)
        _log.warning("job %r: %s; joining anew", job.name, error)
        try:
            recover(job, timeout)
        except ZeroPsError as failed:
            raise type(error)(f"{error}. The job could not be recovered: {failed}") from failed
        job.recovered_at = job.step
        _log.warning("job %r: goes on at step %d", job.name, job.step)
        _rewound(job, expected, on_rewind)
    else:
        job.failures = 0


def _rewound(job: "Job", expected: int, on_rewind: Callable[[int], None] | None) -> None:
    """After the job was recovered; expected: the step that would come next if nothing had been."""
    if job.restored:
        # Its buffers are the commit's.
        job.buffers_before.forget()
    else:
        job.buffers_before.put_back(job)
    if on_rewind is not None and job.step != expected:
        on_rewind(job.step)


class BuffersBefore:
    """Copies of a model's persistent buffers as they were before the last steps, which a forward changes here and
    not on the servers."""

    def __init__(self) -> None:
        self._by_step: dict[int, list[torch.Tensor]] = {}

    def keep(self, job: "Job") -> None:
        """Before a step. Servers may come back to this one, or to one that other trainers have not asked for yet."""
        if job.model is None:
            return
        # A trainer is at most one step ahead of the others, and `max_staleness` more.
        oldest = job.step - 1 - job.model.config.max_staleness
        kept = {step: copies for step, copies in self._by_step.items() if oldest <= step < job.step}
        kept[job.step] = [buffer().detach().clone() for buffer, _ in job.model.buffers]
        self._by_step = kept

    def put_back(self, job: "Job") -> None:
        """What they were before the step that comes next, if that was begun before."""
        copies = self._by_step.get(job.step)
        if job.model is None or copies is None:
            return
        with torch.no_grad():
            for (buffer, _), copy in zip(job.model.buffers, copies, strict=True):
                buffer().copy_(copy)

    def forget(self) -> None:
        self._by_step.clear()
