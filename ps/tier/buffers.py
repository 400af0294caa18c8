"""Memory that the disk can read into: whole pages, mapped for themselves, so that what is freed is gone."""

import torch

from protos.pages import map_pages


class Buffer:
    """`size` bytes of memory, a multiple of PAGE, with anything in them.

    It goes back to the system with the last tensor that refers to it. malloc would keep it: blocks that are
    freed between others that live on stay resident, and a budget in bytes could not be kept.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.data = map_pages(size)
        # The last one, which is asked for again and again.
        self._view = self.data

    def view(self, shape: tuple[int, ...], dtype: torch.dtype, nbytes: int) -> torch.Tensor:
        """The first `nbytes` bytes as a tensor."""
        if self._view.dtype != dtype or self._view.shape != shape:
            self._view = self.data[:nbytes].view(dtype).view(shape)
        return self._view


class BufferPool:
    """Buffers that wait to be used again, by size: fresh pages cost as much as the bytes in them."""

    def __init__(self) -> None:
        self._free: dict[int, list[Buffer]] = {}
        self.bytes = 0

    def take(self, size: int, allowed_bytes: int) -> Buffer:
        """A buffer; what waits besides is given back until it and the buffer are at most `allowed_bytes`."""
        waiting = self._free.get(size)
        if waiting:
            self.bytes -= size
            return waiting.pop()
        self.shrink(max(0, allowed_bytes - size))
        return Buffer(size)

    def give(self, buffer: Buffer) -> None:
        self._free.setdefault(buffer.size, []).append(buffer)
        self.bytes += buffer.size

    def shrink(self, allowed_bytes: int) -> None:
        """Gives back memory until at most `allowed_bytes` wait here."""
        while self.bytes > allowed_bytes:
            size = next(size for size, buffers in self._free.items() if buffers)
            self._free[size].pop()
            self.bytes -= size
