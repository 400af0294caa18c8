"""Bytes of tensors in messages."""

import ctypes

import torch


def joined(head: bytes, tensor: torch.Tensor, start: int, stop: int) -> bytes:
    """Bytes of a contiguous CPU tensor behind `head`.

    Not through a view of torch's: what gives up the interpreter's lock for each message waits for it each time.
    """
    assert 0 <= start <= stop <= tensor.nbytes
    return b"".join((head, (ctypes.c_char * (stop - start)).from_address(tensor.data_ptr() + start)))
