"""Servers for the tests in this folder alone: a server takes 256 jobs, and all tests together have more."""

from collections.abc import Iterator

import pytest

from ps import LocalCluster


@pytest.fixture(scope="package")
def cluster() -> Iterator[LocalCluster]:
    """Two servers; each test uses a job of its own."""
    with LocalCluster(servers=2) as cluster:
        yield cluster
