"""A handful of the faults of `make soak`."""

from pathlib import Path

import pytest

from tests.chaos import chaos


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("trainers", "seed"), [(1, 6), (2, 3)])
def test_whatever_is_killed_stopped_or_cut_off_the_result_is_that_of_an_undisturbed_run(
    tmp_path: Path, trainers: int, seed: int
) -> None:
    tally = chaos(3, seed, tmp_path, trainers=trainers, links=["grpc"])
    assert tally.faults.total() == 3 and tally.final_step > 6
