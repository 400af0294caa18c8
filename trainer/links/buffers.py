"""The memory of tensors as bytes."""

import ctypes

import torch


def byte_view(tensor: torch.Tensor, offset: int, count: int) -> memoryview:
    """Some bytes of a contiguous 1-d uint8 CPU tensor, in place. Not to be used after the tensor.

    Not through numpy: that marks the tensor's storage as not resizable for good, and the storage of a
    parameter is resized at every release.
    """
    assert 0 <= offset <= offset + count <= tensor.numel()
    return memoryview((ctypes.c_char * count).from_address(tensor.data_ptr() + offset)).cast("B")
