"""What the operating system says about this process."""

import re
from pathlib import Path


def memory_bytes() -> tuple[int, int]:
    """Resident memory of this process now, and at its peak; zeros where /proc does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0, 0
    return _kib(status, "VmRSS"), _kib(status, "VmHWM")


def _kib(status: str, field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    return int(match[1]) << 10 if match else 0
