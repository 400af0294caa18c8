"""The server's memory limit. For now it is checked against estimates when a job is opened."""

import threading

from ps.errors import OutOfBudget

_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_bytes(text: str) -> int:
    """Bytes of '8GiB', '500 MB' or '1048576'. ValueError for anything else."""
    text = text.strip()
    number = text.rstrip("BbIiKkMmGgTt ")
    factor = _UNITS.get(text[len(number) :].strip().upper())
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if factor is None or not 0 < value * (factor or 1) < 1 << 62:
        raise ValueError(f"{text!r} is not a size: write bytes, or a number with KiB, MiB, GiB or TiB")
    return int(value * factor)


def format_bytes(size: float) -> str:
    """'8.0 GiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


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
