"""Lines of a log that strangers can cause as often as they like."""

import logging
import threading
import time

_EVERY_SECONDS = 10.0


class Rarely:
    """Writes a warning at most every ten seconds, and with it how many there were meanwhile.

    message: has a place for their number, and one for what is said of the last.
    """

    def __init__(self, log: logging.Logger, message: str) -> None:
        self._log = log
        self._message = message
        self._lock = threading.Lock()
        self._count = 0
        self._due = 0.0

    def warn(self, last: object) -> None:
        with self._lock:
            self._count += 1
            if time.monotonic() < self._due:
                return
            self._due = time.monotonic() + _EVERY_SECONDS
            count, self._count = self._count, 0
        self._log.warning(self._message, count, last)
