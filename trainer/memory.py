"""Memory that comes and goes with every gather and every gradient, kept apart from malloc's.

Blocks of megabytes that come and go in turn leave malloc's heap full of holes that its aligned allocation
does not fill again (glibc before 2.38), so that a process grows far beyond what it holds; and mapping anew
each time costs a page fault for every 4 KiB. So blocks are mapped here and used again by size.
"""

import contextlib
import ctypes
import mmap
import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch

KEEP_BYTES = 64 << 20
"""How much memory that is not in use waits to be used again."""

_SMALL_BYTES = 1 << 16
"""Below this malloc does well, and a mapping of its own would waste most of a page."""


class MemoryPool:
    """Blocks of host memory by size, the last one returned first: it may still be in the cache."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Longest unused first.
        self._free: OrderedDict[int, torch.UntypedStorage] = OrderedDict()
        self._free_bytes = 0
        # Storages whose memory is lent to a parameter's: empty until it comes back.
        self._shells: list[torch.UntypedStorage] = []

    def take(self, nbytes: int) -> torch.UntypedStorage:
        """A storage of `nbytes` bytes with undefined content."""
        if nbytes < _SMALL_BYTES:
            return torch.empty(nbytes, dtype=torch.uint8).untyped_storage()
        with self._lock:
            for key, block in reversed(self._free.items()):
                if block.nbytes() == nbytes:
                    del self._free[key]
                    self._free_bytes -= nbytes
                    return block
        mapping = mmap.mmap(-1, nbytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            mapping.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(mapping, dtype=torch.uint8).untyped_storage()

    def give(self, block: torch.UntypedStorage) -> None:
        """Returns what `take` gave. No tensor may use it any more."""
        nbytes = block.nbytes()
        if nbytes < _SMALL_BYTES:
            return
        with self._lock:
            self._free[id(block)] = block
            self._free_bytes += nbytes
        self.shrink(KEEP_BYTES)

    def shrink(self, keep_bytes: int) -> None:
        """Gives back to the system what is not in use, beyond so many bytes, the longest unused first."""
        with self._lock:
            while self._free_bytes > keep_bytes:
                _, oldest = self._free.popitem(last=False)
                self._free_bytes -= oldest.nbytes()

    def fill(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        """Gives an empty storage memory; on another device than the CPU that device's own."""
        if nbytes < _SMALL_BYTES or storage.device.type != "cpu":
            storage.resize_(nbytes)
            return
        block = self.take(nbytes)
        # Exchanges the memory of the two, of which one has none.
        storage._swap_data_ptr_(block)  # type: ignore[attr-defined]
        self._shells.append(block)

    def empty(self, storage: torch.UntypedStorage) -> None:
        """Takes a storage's memory back, which may have come from elsewhere."""
        # What NumPy has shared is not resizable either, of any size.
        if storage.device.type != "cpu" or storage.resizable():
            storage.resize_(0)
            return
        block = self._shells.pop() if self._shells else torch.empty(0).untyped_storage()
        storage._swap_data_ptr_(block)  # type: ignore[attr-defined]
        self.give(block)


def empty_of(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor in C order that has no memory yet."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    tensor.untyped_storage().resize_(0)
    return tensor


def trim_heap() -> None:
    """Has malloc give memory back to the system that others freed; does nothing where it cannot."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
