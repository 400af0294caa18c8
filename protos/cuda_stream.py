"""A CUDA stream of its own, asked and never waited for in CUDA: whoever waits for it can give up."""

from dataclasses import dataclass

import torch


class Mark:
    """A point in a stream."""

    def __init__(self, event: "torch.cuda.Event") -> None:
        self._event = event

    def reached(self) -> bool:
        """Raises RuntimeError for an error of the device."""
        return bool(self._event.query())  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Stage:
    """A place on the way between host and device, so many bytes on each side. host: pinned."""

    host: torch.Tensor
    device: torch.Tensor


class CudaStream:
    """handle: as NCCL takes it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.handle: int = self._stream.cuda_stream

    def stage(self, nbytes: int) -> Stage:
        # Of this stream, so that what is freed can serve nothing but what this stream does later.
        with torch.cuda.stream(self._stream):
            return Stage(
                torch.empty(nbytes, dtype=torch.uint8, pin_memory=True),
                torch.empty(nbytes, dtype=torch.uint8, device=self._device),
            )

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Between the two sides of a stage, behind what the stream was asked for before."""
        with torch.cuda.stream(self._stream), torch.no_grad():
            target.copy_(source, non_blocking=True)

    def mark(self) -> Mark:
        """The point at which all is done that the stream was asked for."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return Mark(event)
