"""What is read from files that may be replaced while a server runs: tokens and certificates."""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

Value = TypeVar("Value")

_CHECK_SECONDS = 1.0

_log = logging.getLogger(__name__)


class Watched(Generic[Value]):
    """What `load` makes of some files. It is made anew when one of them has changed, which is noticed within a second
    of use; where that fails the old value stays, and the log says why.

    Raises what `load` raises the first time: ValueError or OSError.
    """

    def __init__(self, paths: Sequence[Path], load: Callable[[], Value]) -> None:
        self._paths = paths
        self._load = load
        self._lock = threading.Lock()
        # Before the files are read: what changes meanwhile is read again.
        self._stamp = self._look()
        self._value = load()
        self._due = time.monotonic() + _CHECK_SECONDS

    @property
    def value(self) -> Value:
        if time.monotonic() >= self._due and self._lock.acquire(blocking=False):
            try:
                self._due = time.monotonic() + _CHECK_SECONDS
                if (stamp := self._look()) != self._stamp:
                    self._read(stamp)
            finally:
                self._lock.release()
        return self._value

    def reload(self) -> None:
        """Reads the files whether they look changed or not."""
        with self._lock:
            self._read(self._look())

    def _read(self, stamp: tuple[object, ...]) -> None:
        self._stamp = stamp
        names = ", ".join(map(str, self._paths))
        try:
            self._value = self._load()
        except (ValueError, OSError) as error:
            _log.error("what was read before stays in force, as %s cannot be used: %s", names, error)
        else:
            _log.info("read %s again", names)

    def _look(self) -> tuple[object, ...]:
        """Tells the files as they are from what they were."""
        return tuple(_stamp(path) for path in self._paths)


def _stamp(path: Path) -> object:
    try:
        found = os.stat(path)
    except OSError as error:
        return error.errno
    return found.st_mtime_ns, found.st_size, found.st_ino
