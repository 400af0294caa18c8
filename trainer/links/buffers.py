"""Between the bytes of messages and the memory of tensors."""

import ctypes
import warnings

import torch


def read_only_tensor(data: bytes | memoryview) -> torch.Tensor:
    """A 1-d uint8 tensor over `data` without a copy. Writing to it is undefined; it is a copy's source."""
    return torch.frombuffer(data, dtype=torch.uint8)


def byte_view(tensor: torch.Tensor, offset: int, count: int) -> memoryview:
    """Some bytes of a contiguous 1-d uint8 CPU tensor, in place. Not to be used after the tensor.

    Not through numpy: that marks the tensor's storage as not resizable for good, and the storage of a
    parameter is resized at every release.
    """
    assert 0 <= offset <= offset + count <= tensor.numel()
    return memoryview((ctypes.c_char * count).from_address(tensor.data_ptr() + offset)).cast("B")


# torch warns once in a process that such a tensor must not be written to. Nobody outside this module
# sees one, so the warning is taken here and not in the middle of somebody's training output.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    read_only_tensor(b"\0")
