"""The server's memory limit. For now it is checked against estimates when a job is opened."""

import threading

from protos.sizes import format_bytes
from ps.errors import OutOfBudget


class Budget:
    """Bytes that jobs may take together; no limit if `limit_bytes` is None."""

    def __init__(self, limit_bytes: int | None) -> None:
        self.limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._reserved: dict[str, int] = {}

    def reserve(self, job: str, needed_bytes: int, what: str) -> None:
        """Sets what a job takes. Raises OutOfBudget, with both sizes, and then changes nothing."""
        with self._lock:
            others = sum(size for name, size in self._reserved.items() if name != job)
            if self.limit_bytes is not None and others + needed_bytes > self.limit_bytes:
                beside = f" beside {format_bytes(others)} of other jobs" if others else ""
                raise OutOfBudget(
                    f"job {job!r} needs {format_bytes(needed_bytes)} on this server ({what}){beside}, and its "
                    f"--memory is {format_bytes(self.limit_bytes)}; give it more, or use more servers"
                )
            self._reserved[job] = needed_bytes

    def release(self, job: str) -> None:
        with self._lock:
            self._reserved.pop(job, None)
