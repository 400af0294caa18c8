"""Trainers are killed, stopped, replaced, and come and go: the bits are those of an undisturbed run."""

import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

import trainer
from ps import LocalCluster
from tests.trainer.recovery.processes import Trainers, check

LEASE = 5.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(servers=2, lease=LEASE) as cluster:
        yield cluster


@pytest.mark.parametrize("announced", [False, True], ids=["plain", "announced"])
def test_a_trainer_that_is_killed_is_replaced_and_the_rest_waits_for_it(trainers: Trainers, announced: bool) -> None:
    trainers.start("0", announced=announced)
    trainers.start("1", announced=announced, stall=3)
    trainers.notes("1").wait_for("stalled")
    trainers.kill("1")
    trainers.start("1", announced=announced)
    results = trainers.results()
    check(results, 6)
    (lost,) = results["0"]["lost"]
    assert lost.startswith("TrainerLost") and "rank 1 of job" in lost
    if not announced:
        # No chunk had moved on, so the step is made again from memory.
        assert results["1"]["joined_at"] == 3
        assert results["0"]["rewinds"] == [3]


def test_a_trainer_that_was_stopped_for_longer_than_its_lease_comes_back(trainers: Trainers) -> None:
    trainers.start("0")
    trainers.start("1", stall=3, stall_seconds=1.0)
    trainers.notes("1").wait_for("stalled")
    trainers.signal("1", signal.SIGSTOP)
    time.sleep(LEASE + 2.5)
    trainers.signal("1", signal.SIGCONT)
    results = trainers.results()
    check(results, 6)
    (lost,) = results["1"]["lost"]
    # The other way, where rank 0 was faster to tell this server than the server to look at the lease itself.
    assert lost.startswith(("SessionLost", "TrainerLost")) and "its lease ended after" in lost
    (lost,) = results["0"]["lost"]
    assert "rank 1 of job" in lost and "its lease ended after" in lost


def test_a_trainer_that_was_stopped_and_replaced_says_so_and_disturbs_nobody(trainers: Trainers) -> None:
    # So that the job has not ended when the old one looks for it.
    trainers.start("0", stall=5, stall_until="end")
    trainers.start("1", stall=3, stall_seconds=1.0)
    trainers.start("1 again", wait="parent")
    trainers.notes("1").wait_for("stalled")
    trainers.signal("1", signal.SIGSTOP)
    trainers.notes("parent")("go")
    trainers.notes("0").wait_for("stalled")
    trainers.signal("1", signal.SIGCONT)
    output = trainers.failed("1")
    assert "another trainer process has taken rank 1 of job" in output
    trainers.notes("end")("go")
    results = trainers.results()
    check(results, 6)
    assert len(results["0"]["lost"]) == 1


def test_an_elastic_job_shrinks_and_grows(trainers: Trainers) -> None:
    arguments: dict[str, Any] = {"elastic": True, "grow": True, "until": 10_000}
    trainers.start("0", **arguments)
    trainers.start("1", **arguments, stall=3)
    trainers.start("1 later", **arguments, wait="parent")
    trainers.notes("1").wait_for("stalled")
    trainers.kill("1")
    trainers.notes("0").wait_for("step 4 as 0/1")
    trainers.notes("parent")("go")
    results = trainers.results()
    joined_at = results["1 later"]["joined_at"]
    check(results, joined_at + 3)
    sizes = {step: place[1] for step, place in results["0"]["places"].items()}
    assert sizes == {step: 2 if step < 3 or step >= joined_at else 1 for step in range(joined_at + 3)}
    # The step was made again from memory; who came later came between two steps.
    assert results["0"]["rewinds"] == [3]
    assert len(results["0"]["lost"]) == 1
    assert results["1 later"]["lost"] == []


def test_the_trainers_of_an_elastic_job_go_on_together_when_shard_0_was_started_again(
    trainers: Trainers, cluster: LocalCluster
) -> None:
    arguments: dict[str, Any] = {"elastic": True, "commit_at": 2}
    trainers.start("0", **arguments)
    trainers.start("1", **arguments, stall=3, stall_seconds=1.0)
    trainers.notes("1").wait_for("stalled")
    cluster.restart(0)
    results = trainers.results()
    check(results, 6)
    for result in results.values():
        assert result["rewinds"] == [2] and len(result["lost"]) >= 1
        assert {size for _, size in result["places"].values()} == {2}


def test_elastic_and_fixed_trainers_do_not_mix(cluster: LocalCluster, job_name: str) -> None:
    refused = pytest.raises(trainer.RequestRefused, match="connects to job .* without elastic")
    with trainer.connect(cluster.addresses, job=job_name, elastic=True), refused:
        trainer.connect(cluster.addresses, job=job_name)
