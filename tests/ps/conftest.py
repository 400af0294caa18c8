"""What all tests of the server share."""

from collections.abc import Iterator

import pytest

import protos.layout
from tests.ps.client import Client


@pytest.fixture(autouse=True)
def _clients_leave() -> Iterator[None]:
    """The clients of a test do not outlive it."""
    yield
    while Client.connected:
        Client.connected.pop().drop()


@pytest.fixture(scope="module")
def small_chunks() -> Iterator[None]:
    """Chunks of a few KiB, so that a small model has many. For what a test does in its own process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protos.layout, "CHUNK_BYTES", 4 << 10)
        yield
