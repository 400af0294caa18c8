"""Group mode: a trainer is lost, the others are told which, and all are started again and go on from the servers."""

import signal
from collections.abc import Iterator

import pytest

from ps import LocalCluster
from tests.ranks import free_port
from tests.trainer.recovery.processes import Trainers, check

STEPS, COMMITTED, LOST = 6, 2, 4


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(servers=2, lease=3) as cluster:
        yield cluster


@pytest.mark.parametrize(
    ("number", "announced", "goes_on_at"),
    [
        pytest.param(signal.SIGKILL, False, LOST, id="killed in forward"),
        pytest.param(signal.SIGSTOP, False, LOST, id="stopped in forward"),
        pytest.param(signal.SIGKILL, True, COMMITTED, id="killed when a chunk had moved on"),
    ],
)
def test_the_others_hear_who_is_lost_and_all_go_on_when_they_are_started_again(
    trainers: Trainers, number: signal.Signals, announced: bool, goes_on_at: int
) -> None:
    def start(stall: int) -> None:
        port = free_port()
        for rank in "01":
            trainers.start(
                rank,
                until=STEPS,
                announced=announced,
                port=port,
                commit_at=COMMITTED,
                stall=stall if rank == "1" else -1,
            )

    start(stall=LOST)
    trainers.notes("1").wait_for("stalled")
    trainers.signal("1", number)
    error = trainers.failed("0").splitlines()[-1]
    assert error.startswith("trainer.errors.TrainerLost: ") and "rank 1 of job" in error, error
    trainers.kill("1")
    start(stall=-1)
    results = trainers.results()
    check(results, STEPS)
    assert [result["joined_at"] for result in results.values()] == [goes_on_at] * 2
