"""Memory that is mapped for itself, so that what is freed is gone: malloc would keep blocks between others."""

import mmap

import torch

_HUGE = 2 << 20


def map_pages(nbytes: int) -> torch.Tensor:
    """A 1-d uint8 tensor with zeros, at the beginning of a page; unmapped with the last tensor that refers to it.

    Whole runs of 2 MiB are huge pages where the system has them: a fault for every 4 KiB takes longer than what is
    then done with most of them. Raises OSError.
    """
    # Python maps shared memory unless told otherwise, which is slower to fault in and hardly anywhere has huge pages.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if nbytes < _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.frombuffer(mmap.mmap(-1, nbytes, flags=flags), dtype=torch.uint8)
    # Only some kernels align mappings to huge pages by themselves. What is not touched takes no memory.
    mapping = mmap.mmap(-1, nbytes + _HUGE, flags=flags)
    start = -torch.frombuffer(mapping, dtype=torch.uint8).data_ptr() % _HUGE
    mapping.madvise(mmap.MADV_HUGEPAGE, start, nbytes // _HUGE * _HUGE)
    return torch.frombuffer(mapping, dtype=torch.uint8, count=nbytes, offset=start)
