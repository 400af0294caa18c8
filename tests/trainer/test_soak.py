"""A few cycles of `make soak`."""

from pathlib import Path

import pytest

from tests.soak import soak


@pytest.mark.slow
@pytest.mark.parametrize("disks", [1, 2])
def test_servers_killed_at_random_instants_lose_nothing_that_was_committed(tmp_path: Path, disks: int) -> None:
    outcome = soak(3, 7 + disks, tmp_path, disks=disks)
    assert outcome.kills >= 3 and outcome.committed >= 0
