"""Fixtures that start real servers."""

import itertools
from collections.abc import Iterator

import pytest
import torch

from ps import LocalCluster
from tests import forks

_jobs = itertools.count()


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    # Servers and trainers of one test share two cores.
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _forked_servers() -> Iterator[None]:
    """Servers are started as they always are, but for the imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ps.cluster.subprocess", forks)
        yield


@pytest.fixture(scope="session")
def cluster() -> Iterator[LocalCluster]:
    """Two servers for all tests that leave them alive; each test uses a job of its own."""
    with LocalCluster(servers=2) as cluster:
        yield cluster


@pytest.fixture
def job_name() -> str:
    """The name of a job that no other test uses."""
    return f"job{next(_jobs)}"
