"""A portion of `make garbage`."""

import pytest

from tests.garbage import run


@pytest.mark.slow
def test_messages_that_no_trainer_sends_change_nothing_and_get_a_proper_status() -> None:
    said: list[str] = []
    tally = run(500, 5, said.append)
    assert tally.cases.total() >= 500
    assert {"fields", "pulls", "pushes", "bytes", "other times", "oversized", "connections"} <= tally.cases.keys()
    assert "the server had" in said[0]
