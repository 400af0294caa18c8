"""Between the bytes of messages and the memory of tensors."""

import ctypes
import warnings

import torch


def read_only_tensor(data: bytes) -> torch.Tensor:
    """A 1-d uint8 tensor over `data` without a copy. Writing to it is undefined; it is a copy's source."""
    return torch.frombuffer(data, dtype=torch.uint8)


def copy_bytes(tensor: torch.Tensor, offset: int, count: int) -> bytes:
    """A copy of some bytes of a contiguous 1-d uint8 CPU tensor.

    Not through numpy: that marks the tensor's storage as not resizable for good, and the storage of a
    parameter is resized at every release.
    """
    assert 0 <= offset <= offset + count <= tensor.numel()
    return ctypes.string_at(tensor.data_ptr() + offset, count)


# torch warns once in a process that such a tensor must not be written to. Nobody outside this module
# sees one, so the warning is taken here and not in the middle of somebody's training output.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    read_only_tensor(b"\0")
