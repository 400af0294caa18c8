"""A few seconds of `python -m tests.load`."""

import pytest

from tests.load import check, load


@pytest.mark.slow
def test_32_sessions_get_their_share_each_without_an_error_and_memory_stays_flat() -> None:
    check(load(32, 5.0))
