"""Where a parameter's bytes arrive, and how they get from there to where it is used.

On the CPU they land in the parameter's own storage, and so they do on a CUDA device that all links write to. For
another CUDA device they land in pinned memory and are copied on a stream of its own, as soon as they are there and
while the device computes: the copy waits for what the device did with that memory before, and whoever uses the
parameter waits for the copy, both by events on the device and not by stopping the host.
"""

import threading
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Protocol

import torch

from trainer.device import point
from trainer.parameter import OffloadedParameter


class Landing(Protocol):
    """buffer: a 1-d uint8 tensor of the whole parameter.

    after: points that its device has to have come to before the buffer is written.
    """

    buffer: torch.Tensor
    after: "Sequence[torch.cuda.Event]"

    def arrived(self) -> None:
        """All bytes are in the buffer; called once, from any thread."""

    def use(self) -> None:
        """The parameter is about to be used on the current stream."""

    def close(self) -> None:
        """Nothing writes to the buffer any more, and nothing else will be called."""


class OwnLanding:
    """The parameter's own storage."""

    def __init__(self, state: OffloadedParameter, after: "Sequence[torch.cuda.Event]" = ()) -> None:
        self.buffer = state.bytes_view()
        self.after = after

    def arrived(self) -> None:
        # Views of a parameter's memory tell that it is in use; this one has served.
        self.buffer = _NOTHING

    def use(self) -> None:
        pass

    def close(self) -> None:
        self.buffer = _NOTHING


class PinnedPool:
    """Pinned host memory by size, rounded up to a power of two, used again when its copy is done.

    Pinning costs milliseconds, so what was pinned stays so, up to `keep_bytes` that are not in use.
    """

    def __init__(self, keep_bytes: int = 256 << 20) -> None:
        self._keep_bytes = keep_bytes
        self._lock = threading.Lock()
        self._free: defaultdict[int, deque[torch.Tensor]] = defaultdict(deque)
        self._free_bytes = 0
        # Buffers whose copy may still run, each with the event at its end.
        self._leaving: deque[tuple[torch.cuda.Event, torch.Tensor]] = deque()

    def take(self, nbytes: int) -> torch.Tensor:
        """A pinned 1-d uint8 tensor of at least `nbytes` bytes."""
        size = 1 << max(nbytes - 1, 1 << 16).bit_length()
        with self._lock:
            self._collect()
            if self._free[size]:
                self._free_bytes -= size
                return self._free[size].pop()
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def give(self, buffer: torch.Tensor, copied: "torch.cuda.Event | None") -> None:
        """Returns a buffer, to be used again after the event."""
        with self._lock:
            if copied is None:
                self._keep(buffer)
            else:
                self._leaving.append((copied, buffer))

    def _collect(self) -> None:
        while self._leaving and self._leaving[0][0].query():  # type: ignore[no-untyped-call]
            self._keep(self._leaving.popleft()[1])

    def _keep(self, buffer: torch.Tensor) -> None:
        if self._free_bytes + buffer.numel() <= self._keep_bytes:
            self._free[buffer.numel()].append(buffer)
            self._free_bytes += buffer.numel()


class CudaLanding:
    """Pinned memory, and a copy to the parameter's storage on the copy stream of its device."""

    after: "Sequence[torch.cuda.Event]" = ()

    def __init__(self, state: OffloadedParameter) -> None:
        self._device = state.device
        self._target = state.bytes_view()
        self._pinned = _pinned.take(state.nbytes)
        self.buffer = self._pinned.narrow(0, 0, state.nbytes)
        # What the allocator gave may still be read by kernels that were queued before it was freed.
        self._free_since = point(self._device)
        self._copied: torch.cuda.Event | None = None

    def arrived(self) -> None:
        stream = _copy_stream(self._device)
        with torch.cuda.device(self._device), torch.cuda.stream(stream), torch.no_grad():
            stream.wait_event(self._free_since)
            self._target.copy_(self.buffer, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(stream)
        self._copied = copied

    def use(self) -> None:
        assert self._copied is not None
        # From here on the memory is the current stream's alone, so it can be freed there like any other.
        torch.cuda.current_stream(self._device).wait_event(self._copied)

    def close(self) -> None:
        if self._copied is not None:
            # Should nobody have used it, the memory may be freed only after the copy.
            torch.cuda.current_stream(self._device).wait_event(self._copied)
        _pinned.give(self._pinned, self._copied)
        self.buffer = self._target = _NOTHING


def landing(state: OffloadedParameter, device: torch.device | None) -> Landing:
    """A place for the bytes of a parameter that has its memory. device: that links write to, if there is one."""
    if state.device == device:
        # What the allocator gave may still be read by kernels that were queued before it was freed.
        return OwnLanding(state, (point(device),))
    if state.device.type == "cpu":
        return OwnLanding(state)
    return CudaLanding(state)


_NOTHING = torch.empty(0, dtype=torch.uint8)
_pinned = PinnedPool()
_streams: dict[torch.device, torch.cuda.Stream] = {}
_streams_lock = threading.Lock()


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    with _streams_lock:
        stream = _streams.get(device)
        if stream is None:
            stream = _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return stream
