"""Sessions: leases, fencing, agreement on world size, and that nobody waits for a lost trainer."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import torch

from protos import PROTOCOL_VERSION
from protos import zero_ps_pb2 as pb
from ps import LocalCluster
from ps.options import MAX_JOBS
from tests.ps.client import Client, connect_all, error_of, start_job

LEASE = 2.0
W = {"w": torch.zeros(4)}


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(1, lease=LEASE) as cluster:
        yield cluster


@pytest.fixture
def address(cluster: LocalCluster) -> str:
    return cluster.addresses[0]


def seconds_of(action: Callable[[], object]) -> float:
    began = time.monotonic()
    action()
    return time.monotonic() - began


def test_other_protocol_versions_are_refused_with_both_named(address: str, job_name: str) -> None:
    code, message = error_of(lambda: Client(address, job=job_name, version=PROTOCOL_VERSION + 6))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert f"version {PROTOCOL_VERSION} of the protocol" in message
    assert f"version {PROTOCOL_VERSION + 6}" in message


def test_a_trainer_that_expects_another_shard_is_refused(address: str, job_name: str) -> None:
    code, message = error_of(lambda: Client(address, job=job_name, shard=1, num_shards=2))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "holds shard 0/1, the trainer expects shard 1/2" in message


@pytest.mark.parametrize("name", ["", "../etc", "a/b", ".hidden", "x" * 101, "zero-ps.json", "a\0b"])
def test_job_names_that_cannot_be_folders_are_refused(address: str, name: str) -> None:
    assert error_of(lambda: Client(address, job=name))[0] == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(("rank", "world_size"), [(1, 1), (0, 0), (5, 2), (0, 1 << 20)])
def test_ranks_that_do_not_exist_are_refused(address: str, job_name: str, rank: int, world_size: int) -> None:
    code, _ = error_of(lambda: Client(address, job=job_name, rank=rank, world_size=world_size))
    assert code == grpc.StatusCode.INVALID_ARGUMENT


def test_an_unknown_session_is_told_so(address: str, job_name: str) -> None:
    client = Client(address, job=job_name)
    client.session_id = "nobody"
    code, message = error_of(lambda: client.call("Step"))
    assert code == grpc.StatusCode.NOT_FOUND
    assert "does not know the session" in message


# ---------------------------------------------------------------- fencing


def test_a_newer_trainer_of_a_rank_fences_the_older(address: str, job_name: str) -> None:
    (old,) = start_job(address, W, job=job_name, lr=1.0)
    old.push_gradient(0, torch.ones(4))
    new = Client(address, job=job_name)
    assert new.opened.step == 0
    for action in (
        lambda: old.call("Heartbeat"),
        lambda: old.step(0),
        lambda: old.push_gradient(0, torch.ones(4)),
        lambda: old.push_weight(0, torch.ones(4)),
        lambda: old.pull(0),
        lambda: old.call("Commit", timeout_seconds=1),
        lambda: old.call("CloseSession"),
    ):
        code, message = error_of(action)
        assert code == grpc.StatusCode.NOT_FOUND
        assert "a newer trainer took over rank 0" in message
    new.open_job(W)
    new.set_optimizer(lr=1.0)
    new.step(0)
    assert torch.equal(new.pull(0, version=1), torch.zeros(4)), "the older one's gradient counts nothing"


def test_a_push_that_was_under_way_when_its_session_was_fenced_changes_nothing(address: str, job_name: str) -> None:
    (old,) = start_job(address, W, job=job_name, lr=1.0)
    header = pb.PushHeader(
        session_id=old.session_id,
        kind=pb.PushHeader.KIND_WEIGHT,
        dtype=pb.DTYPE_FLOAT32,
        chunks=old.chunks(0),
    )
    old.pushes.requests.put(pb.PushRequest(header=header))
    old.pushes.requests.put(pb.PushRequest(data=bytes(8)))
    time.sleep(0.2)
    new = Client(address, job=job_name)
    old.pushes.requests.put(pb.PushRequest(data=b"12345678"))
    assert "took over" in next(old.pushes.call).error.message
    new.open_job(W)
    assert torch.equal(new.pull(0), torch.zeros(4))


def test_a_silent_trainer_loses_its_lease(address: str, job_name: str) -> None:
    client = Client(address, job=job_name, heartbeat=False)
    time.sleep(LEASE + 1)
    code, message = error_of(lambda: client.call("Heartbeat"))
    assert code == grpc.StatusCode.NOT_FOUND
    assert "its lease ended" in message


def test_any_call_renews_the_lease(address: str, job_name: str) -> None:
    start_job(address, W, job=job_name)
    silent = Client(address, job=job_name, heartbeat=False)
    silent.open_job(W)
    for _ in range(8):
        time.sleep(LEASE / 3)
        silent.pull(0)
    silent.close()


def test_a_server_that_was_stopped_itself_does_not_blame_the_trainers(
    cluster: LocalCluster, address: str, job_name: str
) -> None:
    client = Client(address, job=job_name)
    os.kill(cluster.pid(0), signal.SIGSTOP)
    time.sleep(LEASE + 1.5)
    os.kill(cluster.pid(0), signal.SIGCONT)
    time.sleep(0.5)
    client.call("Heartbeat")


# ---------------------------------------------------------------- lost trainers


def test_everything_that_waits_for_a_lost_trainer_fails_at_once(address: str, job_name: str) -> None:
    alive, lost = start_job(address, W, job=job_name, world_size=2)
    alive.step(0)
    with ThreadPoolExecutor() as pool:
        waiting = [
            pool.submit(error_of, lambda: alive.pull(0, version=1, timeout=60)),
            pool.submit(error_of, lambda: alive.call("Barrier", timeout=60, tag="t", timeout_seconds=60)),
            pool.submit(error_of, lambda: alive.call("Commit", timeout=60, step=1, timeout_seconds=60)),
        ]
        time.sleep(0.3)
        began = time.monotonic()
        lost.drop()
        for wait in waiting:
            code, message = wait.result()
            assert code == grpc.StatusCode.ABORTED
            assert f"rank 1 of job '{job_name}' is lost: its lease ended" in message
        assert time.monotonic() - began < LEASE + 15
    # Whoever asks now need not wait at all.
    assert seconds_of(lambda: error_of(lambda: alive.pull(0, version=1, timeout=60))) < 15


def test_the_norm_of_gradients_does_not_wait_for_a_lost_trainer(address: str, job_name: str) -> None:
    alive, lost = start_job(address, W, job=job_name, world_size=2)
    lost.drop()
    action = lambda: alive.call("GradNorm", timeout=60, norm_type=2.0, timeout_seconds=60)  # noqa: E731
    assert error_of(action)[0] == grpc.StatusCode.ABORTED


def test_a_trainer_that_left_is_not_waited_for(address: str, job_name: str) -> None:
    alive, gone = start_job(address, W, job=job_name, world_size=2)
    alive.step(0)
    gone.close()
    code, message = error_of(lambda: alive.pull(0, version=1, timeout=60))
    assert code == grpc.StatusCode.ABORTED
    assert "rank 1" in message
    assert "closed" in message


def test_a_step_that_all_agreed_on_is_finished_even_if_one_then_leaves(address: str, job_name: str) -> None:
    alive, gone = start_job(address, W, job=job_name, world_size=2, lr=1.0)
    gone.push_gradient(0, torch.ones(4))
    alive.step(0)
    gone.step(0)
    gone.close()
    assert torch.equal(alive.pull(0, version=1), torch.full((4,), -0.5))


def test_the_successor_of_a_lost_trainer_takes_its_place(address: str, job_name: str) -> None:
    alive, lost = start_job(address, W, job=job_name, world_size=2, lr=1.0)
    lost.push_gradient(0, torch.full((4,), 100.0))
    lost.step(0)
    lost.drop()
    with ThreadPoolExecutor() as pool:
        coming = pool.submit(Client, address, job=job_name, rank=1, world_size=2)
        # The group ends with it: what the other one has done so far counts no more than what is lost.
        code, message = error_of(lambda: alive.pull(0, version=1, timeout=60))
        assert code == grpc.StatusCode.ABORTED
        assert f"rank 1 of job '{job_name}' is lost: " in message and "a newer trainer took over rank 1" in message
        alive = Client(address, job=job_name, rank=0, world_size=2)
        successor = coming.result()
    for client in (alive, successor):
        client.open_job(W)
        client.set_optimizer(lr=1.0)
    alive.step(0)
    successor.push_gradient(0, torch.ones(4))
    successor.step(0)
    assert torch.equal(alive.pull(0, version=1), torch.full((4,), -0.5))


def test_a_new_group_does_not_suffer_from_the_leases_of_the_old(address: str, job_name: str) -> None:
    old = start_job(address, W, job=job_name, world_size=2)
    for client in old:
        client.drop()
    time.sleep(LEASE / 2)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(Client, address, job=job_name, rank=0, world_size=2)
        time.sleep(LEASE)  # Meanwhile the old rank 1 loses its lease.
        Client(address, job=job_name, rank=1, world_size=2).call("Heartbeat")
        first.result().call("Heartbeat")


# ---------------------------------------------------------------- world size


def test_trainers_that_disagree_on_world_size_are_told_within_seconds(address: str, job_name: str) -> None:
    with ThreadPoolExecutor() as pool:
        # Rank 0 waits for a rank 1 of its own world, which never comes.
        waiting = pool.submit(error_of, lambda: Client(address, job=job_name, rank=0, world_size=2, timeout=60))
        while not waiting.running():
            time.sleep(0.01)
        time.sleep(0.5)
        began = time.monotonic()
        code, message = error_of(lambda: Client(address, job=job_name, rank=1, world_size=3))
        assert code == grpc.StatusCode.FAILED_PRECONDITION
        assert message == ("trainers disagree on world size: rank 0 says 2, this trainer (rank 1) says 3")
        code, message = waiting.result()
        assert time.monotonic() - began < LEASE + 15
        assert code == grpc.StatusCode.FAILED_PRECONDITION
        assert message == ("trainers disagree on world size: rank 1 says 3, this trainer (rank 0) says 2")


def test_a_stray_trainer_does_not_disturb_a_complete_group(address: str, job_name: str) -> None:
    clients = start_job(address, W, job=job_name, world_size=2)
    error_of(lambda: Client(address, job=job_name, rank=1, world_size=3))
    with ThreadPoolExecutor() as pool:
        calls = [pool.submit(c.call, "Barrier", tag="on", timeout_seconds=10) for c in clients]
        assert all(len(call.result().payloads) == 2 for call in calls)


def test_another_world_size_waits_for_the_leases_of_a_former_run(address: str, job_name: str) -> None:
    for client in start_job(address, W, job=job_name, world_size=2):
        client.drop()
    client = Client(address, job=job_name)
    assert client.opened.step == 0
    client.open_job(W)
    client.set_optimizer()
    client.step(0)
    client.pull(0, version=1)


def test_waiting_for_a_former_run_ends_in_time(address: str, job_name: str) -> None:
    for client in start_job(address, W, job=job_name, world_size=2):
        client.drop()
    code, message = error_of(lambda: Client(address, job=job_name, timeout=0.5))
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "2 trainers of a former run" in message


# ---------------------------------------------------------------- how many


def _open(client: Client, job: str, rank: int = 0, world_size: int = 1) -> pb.OpenSessionResponse:
    """A further session over the connection of a client."""
    request = pb.OpenSessionRequest(
        protocol_version=PROTOCOL_VERSION,
        job=job,
        rank=rank,
        world_size=world_size,
        incarnation="further",
        num_shards=1,
        timeout_seconds=5,
        group=1,
    )
    return client.stub.OpenSession(request, timeout=20)


def _job_names(client: Client) -> set[str]:
    return {job.name for job in client.stub.Status(pb.StatusRequest(), timeout=20).jobs}


def test_names_that_came_to_nothing_do_not_fill_the_server(address: str, job_name: str) -> None:
    (client,) = start_job(address, W, job=job_name)
    for number in range(MAX_JOBS + 10):
        session = _open(client, f"{job_name}-mistyped{number}")
        client.stub.CloseSession(pb.CloseSessionRequest(session_id=session.session_id), timeout=20)
    error_of(lambda: _open(client, f"{job_name}-refused", rank=1))
    deadline = time.monotonic() + 20
    while any(name.startswith(f"{job_name}-") for name in _job_names(client)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    client.close()
    time.sleep(1)
    assert Client(address, job=job_name).opened.step == 0, "a state is kept"


def test_a_trainer_without_a_group_is_refused(address: str, job_name: str) -> None:
    (client,) = start_job(address, W, job=job_name)
    request = pb.OpenSessionRequest(
        protocol_version=PROTOCOL_VERSION, job=job_name, world_size=1, incarnation="alone", num_shards=1
    )
    code, message = error_of(lambda: client.stub.OpenSession(request, timeout=20))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "0 is no number of a group, which shard 0 gives (JoinGroup)" in message
    client.step(0)


def test_the_memory_of_a_job_that_never_got_its_weights_is_given_back() -> None:
    # Chunks as small as these stay in memory, of which there is enough for one of the two jobs.
    parameters = {f"w{number}": torch.zeros(8_000) for number in range(4)}
    with LocalCluster(1, memory="1MiB") as cluster:
        client = Client(cluster.addresses[0], job="first")
        client.open_job(parameters)
        assert (
            "that cannot be spilled"
            in error_of(lambda: Client(cluster.addresses[0], job="third").open_job(parameters))[1]
        )
        client.close()
        deadline = time.monotonic() + 20
        other = Client(cluster.addresses[0], job="second")
        while "first" in _job_names(other):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        other.open_job(parameters)


# ---------------------------------------------------------------- barrier


def test_a_barrier_gathers_by_rank_and_repeats_its_answer(address: str, job_name: str) -> None:
    clients = connect_all(address, job=job_name, world_size=3)
    with ThreadPoolExecutor() as pool:
        for tag in ("one", "two"):
            calls = [
                pool.submit(c.call, "Barrier", tag=tag, payload=f"{tag}{c.rank}".encode(), timeout_seconds=10)
                for c in reversed(clients)
            ]
            expected = [f"{tag}{rank}".encode() for rank in range(3)]
            assert all(list(call.result().payloads) == expected for call in calls)
    again = clients[1].call("Barrier", tag="two", payload=b"other", timeout_seconds=1)
    assert list(again.payloads) == [b"two0", b"two1", b"two2"]


def test_a_barrier_names_who_is_missing(address: str, job_name: str) -> None:
    client = Client(address, job=job_name, rank=1, world_size=3, group=1)
    code, message = error_of(lambda: client.call("Barrier", tag="go", timeout_seconds=0.3))
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert f"waited 0.3 s for ranks [0, 2] of job '{job_name}' to come to barrier 'go'" in message


def test_a_new_group_may_use_the_tags_of_the_old(address: str, job_name: str) -> None:
    old = Client(address, job=job_name)
    assert list(old.call("Barrier", tag="1", payload=b"old").payloads) == [b"old"]
    new = Client(address, job=job_name)
    assert list(new.call("Barrier", tag="1", payload=b"new").payloads) == [b"new"]
