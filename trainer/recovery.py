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
    TrainerLost,
    ZeroPsError,
)
from trainer.resume import resume

if TYPE_CHECKING:
    from trainer.job import Job

_MENDABLE = (ConnectError, TrainerLost, SessionLost, StepHalfDone, DeadlineExceeded)
"""What joining anew may mend. A server's failure (its disk, an update) would only come again."""

_TRANSIENT = (ServerLost, TrainerLost, SessionLost)
"""What may happen while joining, and be otherwise the next time."""

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
    while True:
        try:
            _join_once(job, max(0.1, end - time.monotonic()), at_boundary=at_boundary)
            return
        except _TRANSIENT as error:
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
    except _TRANSIENT as error:
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
    began = job.step
    try:
        if 0 < job.regroup_at <= job.step:
            recover(job, timeout, at_boundary=True)
        began, buffers = job.step, _buffers(job)
        yield
    except _MENDABLE as error:
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
        if job.step == began and not job.restored:
            _put_back(job, buffers)
        _log.warning("job %r: goes on at step %d", job.name, job.step)
    else:
        job.failures = 0
    if on_rewind is not None and job.step != began + 1:
        on_rewind(job.step)


def _buffers(job: "Job") -> list[torch.Tensor]:
    """Copies of the model's buffers, which a forward changes here and not on the servers."""
    return [] if job.model is None else [buffer().detach().clone() for buffer, _ in job.model.buffers]


def _put_back(job: "Job", copies: list[torch.Tensor]) -> None:
    if job.model is not None:
        with torch.no_grad():
            for (buffer, _), copy in zip(job.model.buffers, copies, strict=True):
                buffer().copy_(copy)
