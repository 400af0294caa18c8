"""A few cycles of `make soak`."""

from pathlib import Path

import pytest

from tests.soak import soak


@pytest.mark.slow
@pytest.mark.parametrize(("disks", "memory"), [(1, None), (2, "10MiB")], ids=["in memory", "limited, two disks"])
def test_servers_killed_at_random_instants_lose_nothing_that_was_committed(
    tmp_path: Path, disks: int, memory: str | None
) -> None:
    outcome = soak(3, 7 + disks, tmp_path, disks=disks, memory=memory)
    assert outcome.kills >= 3 and outcome.committed >= 0
