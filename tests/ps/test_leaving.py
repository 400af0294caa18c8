"""SIGTERM on servers: they commit at a step boundary, as one although each does so on its own, and leave."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest
import torch

import trainer
from protos import zero_ps_pb2 as pb
from ps import LocalCluster
from tests.models import Residual, seeded, train
from tests.ps.client import Client, error_of, start_job

W = {"w": torch.zeros(4), "v": torch.ones(3)}


def small() -> torch.nn.Module:
    return Residual(vocabulary=101, width=16, layers=1)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    with LocalCluster(2, data_dir=tmp_path, lease=30) as cluster:
        yield cluster


class Run:
    """A trainer of one job, and the same steps in plain torch."""

    def __init__(self) -> None:
        self.plain = seeded(small)
        self._optimizer = torch.optim.AdamW(self.plain.parameters(), lr=1e-3, fused=True)
        self.losses: list[float] = []

    def loss(self, step: int) -> float:
        while len(self.losses) <= step:
            self.losses += train(self.plain, self._optimizer, [len(self.losses)])
        return self.losses[step]

    def joins(self, job: trainer.Job) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        with job.init():
            model = seeded(small)
        trainer.offload(model, job)
        return model, trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-3)

    def steps(self, job: trainer.Job, built: tuple[torch.nn.Module, torch.optim.Optimizer], count: int) -> None:
        for _ in range(count):
            step = job.step
            (loss,) = train(*built, [step])
            assert loss == self.loss(step), step


def generations(cluster: LocalCluster, job: str = "job") -> list[set[str]]:
    """By server, the folders of the job's commits."""
    return [{path.name for path in (folder / job / "generations").glob("[0-9]*")} for folder in cluster.data_dirs]


def test_servers_that_stop_between_steps_make_one_commit_from_which_training_goes_on(cluster: LocalCluster) -> None:
    run = Run()
    with trainer.connect(cluster.addresses, job="job") as job:
        run.steps(job, run.joins(job), 3)
        cluster.stop(0, 1)
    assert generations(cluster) == [{"00000003"}] * 2
    for server in range(2):
        cluster.restart(server)
    with trainer.connect(cluster.addresses, job="job") as job:
        assert (job.step, job.exists) == (3, True)
        run.steps(job, run.joins(job), 2)
        job.commit()


def test_nothing_is_committed_twice(cluster: LocalCluster) -> None:
    run = Run()
    with trainer.connect(cluster.addresses, job="job") as job:
        run.steps(job, run.joins(job), 2)
        job.commit({"kept": 1})
    cluster.stop(0, 1)
    assert generations(cluster) == [{"00000002"}] * 2
    assert "job 'job': nothing to commit: the state in memory is that of step 2, commit " in cluster.log(0)
    assert " 0 bytes" not in cluster.log(0)
    for server in range(2):
        cluster.restart(server)
    with trainer.connect(cluster.addresses, job="job") as job:
        assert job.metadata == {"kept": 1}


@pytest.mark.parametrize("seed", [1, 3])
def test_stopped_in_the_middle_of_training_the_last_common_commit_is_usable(cluster: LocalCluster, seed: int) -> None:
    run, made, ended = Run(), [0], []

    def trains() -> None:
        try:
            with trainer.connect(cluster.addresses, job="job") as job:
                built = run.joins(job)
                run.steps(job, built, 1)
                job.commit()
                while True:
                    run.steps(job, built, 1)
                    made[0] = job.step
        except trainer.ZeroPsError as error:
            ended.append(error)

    thread = threading.Thread(target=trains)
    thread.start()
    deadline = time.monotonic() + 60
    while made[0] < 3 and thread.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.013 * seed)
    cluster.stop(0, 1)
    thread.join(60)
    assert not thread.is_alive(), "the trainer hangs"
    assert ended and isinstance(ended[0], trainer.ConnectError), ended
    for server in range(2):
        cluster.restart(server)
    with trainer.connect(cluster.addresses, job="job") as job:
        assert job.step in (1, made[0], made[0] + 1)
        run.steps(job, run.joins(job), 2)


# ---------------------------------------------------------------- one server, by messages


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LocalCluster]:
    with LocalCluster(1, data_dir=tmp_path, lease=30) as cluster:
        yield cluster


def terminate(server: LocalCluster) -> psutil.Process:
    """Sends the signal, and returns once the server knows."""
    process = psutil.Process(server.pid(0))
    os.kill(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + 20
    while "stops" not in server.log(0):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_a_step_that_some_ranks_have_asked_for_comes_about(server: LocalCluster) -> None:
    first, second = start_job(server.addresses[0], W, world_size=2, lr=1.0)
    for client in (first, second):
        client.push_gradient(0, torch.ones(4))
    first.step(0)
    process = terminate(server)
    second.step(0)
    code, _ = error_of(lambda: second.step(1))
    assert code == grpc.StatusCode.UNAVAILABLE
    process.wait(20)
    server.restart(0)
    again = Client(server.addresses[0])
    assert again.committed_steps == [1]
    again.call("Restore", step=1, commit_id=again.opened.committed[0].commit_id)
    again.open_job(W)
    assert torch.equal(again.pull(0, version=1), torch.full((4,), -1.0))


def test_what_is_half_done_is_not_committed_and_the_last_commit_stays(server: LocalCluster) -> None:
    first, second = start_job(server.addresses[0], W, world_size=2, lr=1.0)
    first.call("Commit")
    for client in (first, second):
        client.announce()
        client.push_gradient(0, torch.ones(4), final=True)
    first.pull(0, version=1)
    process = terminate(server)
    process.wait(30)
    assert "step 0 is half done, and its trainers did not complete it in time" in server.log(0)
    server.restart(0)
    assert Client(server.addresses[0]).committed_steps == [0]


def test_a_second_signal_ends_it_at_once(server: LocalCluster) -> None:
    first, _ = start_job(server.addresses[0], W, world_size=2, lr=1.0)
    first.step(0)
    process = terminate(server)
    os.kill(process.pid, signal.SIGTERM)
    # Not for the second trainer, whose lease is 30 s.
    process.wait(15)
    assert generations(server) == [set()]


def test_weights_of_which_more_may_come_are_not_committed(server: LocalCluster) -> None:
    (client,) = start_job(server.addresses[0], W, lr=1.0)
    client.step(0)
    client.call("Commit", step=1)
    client.push_weight(0, torch.full((4,), 5.0), step=1)
    terminate(server).wait(20)
    assert "may not have assigned all" in server.log(0)
    server.restart(0)
    assert Client(server.addresses[0]).committed_steps == [1]


def test_whoever_waits_for_a_step_that_will_not_come_is_told(server: LocalCluster) -> None:
    (client,) = start_job(server.addresses[0], W, lr=1.0)
    request = pb.CommitRequest(session_id=client.session_id, step=1, commit_id="ab", timeout_seconds=60)
    commit = client.stub.Commit.future(request, timeout=60)
    client.call("Heartbeat")
    pull = client.send_pull([0], version=1, timeout=60)
    terminate(server).wait(20)
    code, message = error_of(lambda: commit.result(20))
    assert code == grpc.StatusCode.UNAVAILABLE and "is stopping and begins no step 0" in message
    assert error_of(lambda: client.receive(pull, 1))[0] == grpc.StatusCode.UNAVAILABLE


def test_a_server_that_stops_opens_no_session(server: LocalCluster) -> None:
    first, second = start_job(server.addresses[0], W, world_size=2, lr=1.0)
    first.step(0)
    process = terminate(server)
    code, message = error_of(lambda: [Client(server.addresses[0], job=f"other-{number}") for number in range(100)])
    assert code == grpc.StatusCode.UNAVAILABLE and "is stopping and opens no session" in message
    second.step(0)
    process.wait(20)
