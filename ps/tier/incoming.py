"""Memory for data on its way in."""

from collections import deque

import torch

from protos.sizes import format_bytes
from ps.monitor import Monitor, Patience
from ps.store.direct import page_aligned
from ps.tier.buffers import Buffer
from ps.tier.room import Room
from ps.tier.shares import Shares


class Incoming:
    """Memory for a tensor that is on its way in. It becomes a part's, or is given back."""

    def __init__(self, tensor: torch.Tensor, buffer: Buffer | None) -> None:
        self.tensor = tensor
        self.buffer = buffer


class Arrivals:
    """All data on its way into a tier: together it stays below its share, and the oldest that waits is first."""

    def __init__(self, room: Room, shares: Shares, monitor: Monitor) -> None:
        self._room = room
        self._shares = shares
        self._monitor = monitor
        self._bytes = 0
        self._queue: deque[object] = deque()

    def begin(self, shape: tuple[int, ...], dtype: torch.dtype, what: str, patience: Patience) -> Incoming:
        """See `Tier.incoming`."""
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        size = page_aligned(max(1, nbytes))
        self._shares.check_arrives(size, what)
        ticket = object()
        with self._monitor:
            self._queue.append(ticket)
            try:
                self._monitor.wait_until(
                    lambda: self._queue[0] is ticket and self._bytes + size <= self._shares.incoming_limit_bytes,
                    patience,
                    lambda: f"{format_bytes(self._bytes)} on their way in, so that {what} finds room",
                )
                self._bytes += size
            finally:
                self._queue.remove(ticket)
                self._monitor.changed()
            try:
                self._room.wait(size, what, patience)
            except BaseException:
                self._bytes -= size
                raise
            buffer = self._room.buffer(size)
        return Incoming(buffer.view(shape, dtype, nbytes), buffer)

    def end(self, incoming: Incoming) -> Buffer:
        """It has arrived: its memory is the caller's. Expects the monitor to be held, and a buffer."""
        buffer, incoming.buffer = incoming.buffer, None
        assert buffer is not None
        self._bytes -= buffer.size
        return buffer
