"""malloc's heap in a process whose gradients come and go: it is kept from growing towards the size of the model.

A gradient's block is freed as soon as it has left, and the holes that such blocks leave are not always filled by the
next ones (glibc before 2.38 has none for aligned blocks). Memory that is freed only to be used again at once, as
that of activations is, had better stay: pages that go back to the system come again with a fault for each 4 KiB.
"""

import contextlib
import ctypes
import os

_LOOK_BYTES = 64 << 20
_SLACK_BYTES = 16 << 20
_SLACK_SHARE = 0.5
"""Of the most that was in use. Activations leave holes of a quarter to two fifths of it, and go into them again; to
give those back each time cost a compute-bound step of 151 M parameters 80,000 faults, 0.2 of its 2.8 processor seconds.
"""


class _Mallinfo2(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def trim_heap() -> None:
    """Has malloc give memory back to the system that others freed; does nothing where it cannot."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


class Heap:
    """Gives freed memory back where half as much again is resident as was ever in use, and 16 MiB.

    tight: where more is than was ever in use and 16 MiB, as memory is limited.
    """

    def __init__(self, *, tight: bool = False) -> None:
        self._share = 0.0 if tight else _SLACK_SHARE
        self._left_bytes = 0
        # The most that malloc's blocks had, and what is resident beside them.
        self._most_bytes = 0
        self._beside_bytes: int | None = None

    def gradient_left(self, nbytes: int, pooled_bytes: int) -> None:
        """A gradient of so many bytes has been freed. pooled_bytes: what is mapped outside of malloc's heap."""
        self._left_bytes += nbytes
        if self._left_bytes < _LOOK_BYTES:
            return
        self._left_bytes = 0
        used = used_bytes()
        if used is None:
            # There is no telling how much is free.
            trim_heap()
            return
        self._most_bytes = max(self._most_bytes, used)
        if self._beside_bytes is not None:
            heap = _resident_bytes() - pooled_bytes - self._beside_bytes
            if heap <= self._most_bytes * (1 + self._share) + _SLACK_BYTES:
                return
        trim_heap()
        # Nothing that is free is resident now.
        self._beside_bytes = _resident_bytes() - pooled_bytes - used


def used_bytes() -> int | None:
    """Of malloc's blocks; None where it does not tell (before glibc 2.33)."""
    try:
        tell = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        return None
    tell.restype = _Mallinfo2
    found = tell()
    return int(found.uordblks + found.hblkhd)


def _resident_bytes() -> int:
    """Memory of this process alone, without files and what it shares."""
    with open("/proc/self/statm", encoding="ascii") as file:
        fields = file.read().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")
