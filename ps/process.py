"""What the operating system says about this process, and what it is asked for."""

import ctypes
import re
from contextlib import suppress
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def memory_bytes() -> tuple[int, int]:
    """Resident memory of this process now, and at its peak; zeros where /proc does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0, 0
    return _kib(status, "VmRSS"), _kib(status, "VmHWM")


def return_freed_blocks(least_bytes: int = 1 << 20) -> None:
    """Has malloc give blocks of this size and more back when they are freed; does nothing where it cannot.

    For a process whose work is to pass such blocks on. glibc gives each a mapping of its own at first, but
    with every one that is freed it takes larger ones, up to 32 MiB, from heaps, which then keep the holes.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, least_bytes)


def keep_freed_blocks() -> None:
    """Has malloc keep freed memory, up to 64 MiB at the end of each heap; does nothing where it cannot.

    For a process whose work is to receive blocks and let go of them: pages that go back to the system and come again
    cost more than the bytes in them. This is where glibc gets by itself once blocks of 32 MiB have been freed.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def share_heaps(count: int) -> None:
    """Has the threads of this process share so many of malloc's heaps, each of which keeps memory of its own."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, count)


def _kib(status: str, field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    return int(match[1]) << 10 if match else 0
