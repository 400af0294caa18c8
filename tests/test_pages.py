"""Memory that is mapped for itself."""

import resource

import pytest
import torch

from protos.pages import map_pages

MIB = 1 << 20


@pytest.mark.parametrize("nbytes", [1, 4096, 2 * MIB, 2 * MIB + 1, 5 * MIB])
def test_what_is_mapped_has_its_size_zeros_and_a_page_to_begin_on(nbytes: int) -> None:
    pages = map_pages(nbytes)
    assert pages.shape == (nbytes,) and pages.untyped_storage().nbytes() == nbytes
    assert pages.data_ptr() % 4096 == 0 and not pages.any()
    pages.fill_(1)
    assert pages.sum() == nbytes


def test_it_goes_with_the_last_tensor_that_refers_to_it() -> None:
    """Not shared memory either, which would be slower to fault in and counted by other limits."""
    pages = map_pages(64 * MIB)
    pages.fill_(1)
    view = pages[MIB:].view(torch.float32)
    before = _resident()
    del pages
    assert _resident() > before - 32 * MIB and view[0] != 0
    del view
    assert _resident() < before - 32 * MIB
    assert _shared() < 32 * MIB


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _shared() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssShmem"))
