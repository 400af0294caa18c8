"""What all tests of the server share."""

from collections.abc import Iterator

import pytest

from tests.ps.client import Client


@pytest.fixture(autouse=True)
def _clients_leave() -> Iterator[None]:
    """The clients of a test do not outlive it."""
    yield
    while Client.connected:
        Client.connected.pop().drop()
