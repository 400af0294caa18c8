"""What a server has moved, and what it is doing right now."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Traffic:
    """Counters of one server; safe to use from all its threads.

    active: calls, and requests of streams, that have not been answered yet.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.bytes_pulled = 0
        self.bytes_pushed = 0
        self.active = 0

    def pulled(self, size: int) -> None:
        with self._lock:
            self.bytes_pulled += size

    def pushed(self, size: int) -> None:
        with self._lock:
            self.bytes_pushed += size

    @contextmanager
    def busy(self) -> Iterator[None]:
        with self._lock:
            self.active += 1
        try:
            yield
        finally:
            with self._lock:
                self.active -= 1
