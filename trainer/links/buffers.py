"""The memory of tensors as bytes."""

import ctypes
import functools

import torch


def fill(target: torch.Tensor, offset: int, source: memoryview) -> None:
    """Copies bytes into a contiguous 1-d uint8 tensor, which has them when this returns."""
    if target.device.type == "cpu":
        byte_view(target, offset, len(source))[:] = source
        return
    # Not behind what the device is doing.
    with torch.cuda.stream(_stream(target.device)), torch.no_grad():
        target.narrow(0, offset, len(source)).copy_(torch.frombuffer(bytearray(source), dtype=torch.uint8))


@functools.cache
def _stream(device: torch.device) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def byte_view(tensor: torch.Tensor, offset: int, count: int) -> memoryview:
    """Some bytes of a contiguous 1-d uint8 CPU tensor, in place. Not to be used after the tensor.

    Not through numpy: that marks the tensor's storage as not resizable for good, and the storage of a
    parameter is resized at every release.
    """
    assert 0 <= offset <= offset + count <= tensor.numel()
    return memoryview((ctypes.c_char * count).from_address(tensor.data_ptr() + offset)).cast("B")
