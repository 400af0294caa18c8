"""A handful of the faults of `make soak`."""

from pathlib import Path

import pytest

from tests.chaos import VARIANTS, chaos


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("variant", "seed"), [("one", 6), ("two", 3), ("elastic", 3)])
def test_whatever_is_killed_stopped_or_cut_off_the_result_is_that_of_an_undisturbed_run(
    tmp_path: Path, variant: str, seed: int
) -> None:
    tally = chaos(3, seed, tmp_path, VARIANTS[variant])
    assert tally.faults.total() == 3 and tally.final_step > 6
