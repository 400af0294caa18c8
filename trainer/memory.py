"""Memory that comes and goes with every gather and every gradient, kept apart from malloc's.

Blocks of megabytes that come and go in turn leave malloc's heap full of holes that its aligned allocation
does not fill again (glibc before 2.38), so that a process grows far beyond what it holds; and mapping anew
each time costs a page fault for every 4 KiB. So blocks are mapped here and used again by size.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch

from protos.pages import map_pages

KEEP_BYTES = 64 << 20
"""So much memory that is not in use waits to be used again, and more where lately more was in use at a time."""

_SMALL_BYTES = 1 << 16
"""Below this malloc does well, and a mapping of its own would waste most of a page."""


class MemoryPool:
    """Blocks of host memory by size, the last one returned first: it may still be in the cache.

    free_bytes: what waits to be used again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Longest unused first.
        self._free: OrderedDict[int, torch.UntypedStorage] = OrderedDict()
        self.free_bytes = 0
        self._used_bytes = 0
        # The most that was in use at a time: in this round and in the one before.
        self._most_bytes = self._former_most_bytes = 0
        # Storages whose memory is lent to a parameter's: empty until it comes back.
        self._shells: list[torch.UntypedStorage] = []

    def take(self, nbytes: int) -> torch.UntypedStorage:
        """A storage of `nbytes` bytes with undefined content."""
        if nbytes < _SMALL_BYTES:
            return torch.empty(nbytes, dtype=torch.uint8).untyped_storage()
        with self._lock:
            self._used_bytes += nbytes
            self._most_bytes = max(self._most_bytes, self._used_bytes)
            for key, block in reversed(self._free.items()):
                if block.nbytes() == nbytes:
                    del self._free[key]
                    self.free_bytes -= nbytes
                    return block
        self.shrink(self._kept_bytes())
        return map_pages(nbytes).untyped_storage()

    def give(self, block: torch.UntypedStorage) -> None:
        """Returns what `take` gave. No tensor may use it any more."""
        nbytes = block.nbytes()
        if nbytes < _SMALL_BYTES:
            return
        with self._lock:
            self._free[id(block)] = block
            self.free_bytes += nbytes
            # What came from elsewhere was never counted.
            self._used_bytes = max(0, self._used_bytes - nbytes)
        self.shrink(self._kept_bytes())

    def _kept_bytes(self) -> int:
        return max(KEEP_BYTES, max(self._most_bytes, self._former_most_bytes) - self._used_bytes)

    def new_round(self) -> None:
        """What was in use before the last round is no measure any more of what will be."""
        with self._lock:
            self._former_most_bytes, self._most_bytes = self._most_bytes, self._used_bytes

    @property
    def mapped_bytes(self) -> int:
        """What is in use and what waits."""
        return self._used_bytes + self.free_bytes

    def shrink(self, keep_bytes: int) -> None:
        """Gives back to the system what is not in use, beyond so many bytes, the longest unused first."""
        with self._lock:
            while self.free_bytes > keep_bytes:
                _, oldest = self._free.popitem(last=False)
                self.free_bytes -= oldest.nbytes()

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
