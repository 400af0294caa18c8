"""The lock of a job, and how everything in it waits."""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ps.errors import Cancelled, InvalidRequest, Timeout

_MAX_WAIT_SECONDS = 24 * 3600.0
_CANCEL_CHECK_SECONDS = 0.5


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Patience:
    """How long a caller waits: until `end` on the monotonic clock, or until it is cancelled."""

    end: float
    seconds: float
    cancelled: Callable[[], bool] = field(default=_never)

    @staticmethod
    def of(seconds: float, cancelled: Callable[[], bool] = _never) -> "Patience":
        """Raises InvalidRequest for a time that is negative or not a number."""
        if math.isnan(seconds) or seconds < 0:
            raise InvalidRequest(f"timeout_seconds has to be at least 0, not {seconds}")
        seconds = min(seconds, _MAX_WAIT_SECONDS)
        return Patience(time.monotonic() + seconds, seconds, cancelled)


class Monitor:
    """One lock and one condition for a whole job.

    A single condition is enough: those who wait number as many as trainers, not as many as chunks.

    Locks are taken in this order, and none is waited for while a later one is held: a session's
    contributions, the job's disk lock, its `shard_lock`, this monitor, a chunk.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition(threading.RLock())

    def __enter__(self) -> "Monitor":
        self._condition.acquire()
        return self

    def __exit__(self, *exc: object) -> None:
        self._condition.release()

    def changed(self) -> None:
        """Makes everyone who waits look again."""
        with self._condition:
            self._condition.notify_all()

    def wait_until(
        self,
        ready: Callable[[], bool],
        patience: Patience,
        what: Callable[[], str],
        give_up: Callable[[], None] = lambda: None,
    ) -> None:
        """Waits, with the lock held around every look, until `ready()`.

        give_up: raises when there is no point in waiting on; asked only while `ready()` is false.
        what: names what is waited for, for the error. Raises Timeout and Cancelled.
        """
        with self._condition:
            while not ready():
                give_up()
                left = patience.end - time.monotonic()
                if left <= 0:
                    raise Timeout(f"waited {round(patience.seconds, 2):g} s for {what()}")
                if patience.cancelled():
                    raise Cancelled(f"cancelled while waiting for {what()}")
                self._condition.wait(min(left, _CANCEL_CHECK_SECONDS))
