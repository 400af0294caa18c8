"""What the tests of trainers in processes of their own share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ps import LocalCluster
from tests.trainer.recovery.processes import Trainers


@pytest.fixture
def trainers(cluster: LocalCluster, job_name: str, tmp_path: Path) -> Iterator[Trainers]:
    trainers = Trainers(cluster, job_name, tmp_path)
    yield trainers
    trainers.close()
