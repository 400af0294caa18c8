"""Groups of trainers: shard 0 forms them, servers end them, and a message of one that has ended changes nothing."""

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import grpc
import pytest
import torch

from protos import PROTOCOL_VERSION
from protos import zero_ps_pb2 as pb
from protos import zero_ps_pb2_grpc as pb_grpc
from ps import LocalCluster
from tests.ps.client import Client, connect_all, error_of, start_job

LEASE = 4.0
W = {"w": torch.zeros(4)}
REFUSED = grpc.StatusCode.FAILED_PRECONDITION
_incarnations = itertools.count()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with LocalCluster(1, lease=LEASE) as cluster:
        yield cluster.addresses[0]


class Joining:
    """Trainers that ask to join a job's group, each in a thread of its own."""

    def __init__(self, address: str, job: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self._stub = pb_grpc.ParameterServerStub(self._channel)
        self._job = job
        self._pool = ThreadPoolExecutor(16)

    def join(self, rank: int, world_size: int = 2, timeout: float = 20.0, **fields) -> "Future[pb.JoinGroupResponse]":
        request = pb.JoinGroupRequest(
            **{
                "protocol_version": PROTOCOL_VERSION,
                "job": self._job,
                "incarnation": f"joining-{next(_incarnations)}",
                "rank": rank,
                "world_size": world_size,
                "timeout_seconds": timeout,
                "num_shards": 1,
                **fields,
            }
        )
        return self._pool.submit(self._stub.JoinGroup, request, timeout=timeout + 10)

    def beat(self, joined: pb.JoinGroupResponse) -> None:
        self._stub.Heartbeat(pb.HeartbeatRequest(session_id=joined.session_id), timeout=20)

    def end(self, joined: pb.JoinGroupResponse) -> None:
        self._stub.EndGroup(pb.EndGroupRequest(session_id=joined.session_id, reason="a test"), timeout=20)

    def close(self) -> None:
        # Ends what is still waiting.
        self._channel.close()
        self._pool.shutdown(cancel_futures=True)


@pytest.fixture
def joining(address: str, job_name: str) -> Iterator[Joining]:
    joining = Joining(address, job_name)
    yield joining
    joining.close()


def place(joined: "Future[pb.JoinGroupResponse]") -> tuple[int, int]:
    response = joined.result()
    return response.rank, response.world_size


# ---------------------------------------------------------------- joining


def test_a_group_is_formed_when_all_ranks_are_there(joining: Joining) -> None:
    second = joining.join(1)
    time.sleep(0.2)
    assert not second.done()
    first = joining.join(0)
    assert (place(first), place(second)) == ((0, 2), (1, 2))
    assert first.result().group == second.result().group > 0


def test_who_is_missing_is_named(joining: Joining) -> None:
    code, message = error_of(joining.join(1, 3, timeout=0.3).result)
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "waited 0.3 s for ranks [0, 2] of job" in message


def test_numbers_of_groups_grow_also_where_the_server_does_not_know_them(joining: Joining) -> None:
    assert joining.join(0, 1, known_group=41).result().group == 42
    assert joining.join(0, 1).result().group == 43


def test_another_version_of_the_protocol_is_refused_with_both_named(joining: Joining) -> None:
    code, message = error_of(joining.join(0, 1, protocol_version=PROTOCOL_VERSION + 6).result)
    assert code == REFUSED
    assert f"version {PROTOCOL_VERSION} of the protocol, the trainer version {PROTOCOL_VERSION + 6}" in message


@pytest.mark.parametrize(
    "fields",
    [
        {"incarnation": ""},
        {"incarnation": "x" * 1000},
        {"rank": 2, "world_size": 2},
        {"world_size": 0, "rank": 0},
        {"known_group": (1 << 64) - 1},
        {"known_group": 1 << 33},
        {"former_group": 5},
        {"timeout_seconds": -1.0},
        {"job": "../x"},
    ],
)
def test_what_makes_no_sense_is_refused(joining: Joining, fields: dict) -> None:
    assert (
        error_of(joining.join(**{"rank": 0, "world_size": 1, **fields}).result)[0] == grpc.StatusCode.INVALID_ARGUMENT
    )


def test_one_that_comes_again_takes_no_rank_from_another_process(joining: Joining) -> None:
    old = joining.join(0, 1, incarnation="old").result()
    new = joining.join(0, 1, incarnation="new").result()
    for known in (old.group, new.group):
        again = joining.join(0, 1, incarnation="old", again=True, former_group=old.group, known_group=known)
        code, message = error_of(again.result)
        assert code == REFUSED
        assert "another trainer process has taken rank 0 of job" in message
    joining.beat(new)
    # Nor from one that waits and was in a later group.
    waiting = joining.join(0, 2, incarnation="later", again=True, former_group=9, known_group=9)
    time.sleep(0.2)
    joining.end(new)
    code, _ = error_of(joining.join(0, 2, incarnation="old", again=True, former_group=1, known_group=9).result)
    assert code == REFUSED
    joining.join(1, 2)
    assert place(waiting)[0] == 0


def test_a_trainer_that_dies_before_it_opened_a_session_is_noticed(joining: Joining) -> None:
    first, _ = joining.join(0), joining.join(1)
    deadline = time.monotonic() + LEASE + 20
    while True:
        try:
            joining.beat(first.result())
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.ABORTED
            assert "rank 1 of job" in error.details()
            break
        assert time.monotonic() < deadline
        time.sleep(LEASE / 5)


# ---------------------------------------------------------------- elastic


def elastic(joining: Joining, name: str, rank: int, former: pb.JoinGroupResponse | None = None, **fields):
    if former is not None:
        fields = {"again": True, "former_group": former.group, "known_group": former.group, **fields}
        fields["world_size"] = former.world_size
    return joining.join(**{"rank": rank, "incarnation": name, "elastic": True, **fields})


def test_an_elastic_group_goes_on_with_who_is_left_and_takes_in_who_comes(joining: Joining) -> None:
    asked = time.monotonic()
    began = [elastic(joining, name, rank, world_size=3) for rank, name in enumerate("abc")]
    assert [place(each) for each in began] == [(0, 3), (1, 3), (2, 3)]
    a, _, c = (each.result() for each in began)
    # b dies: the others come again, and wait for it no longer than for its lease.
    joining.end(a)
    again = [elastic(joining, "c", 2, c), elastic(joining, "a", 0, a)]
    time.sleep(LEASE / 2)
    assert not any(each.done() for each in again) or time.monotonic() - asked > LEASE
    assert [place(each) for each in again] == [(1, 2), (0, 2)], "they keep their order"
    c, a = (each.result() for each in again)
    # d comes, and waits until the others are at the end of a step.
    newcomer = elastic(joining, "d", 0, world_size=3)
    time.sleep(0.3)
    assert not newcomer.done()
    joining.beat(a)
    others = [elastic(joining, "a", 0, a, keep_session=True)]
    time.sleep(0.3)
    joining.beat(a), joining.beat(c)
    assert not newcomer.done()
    others.append(elastic(joining, "c", 1, c, keep_session=True))
    assert [place(each) for each in [*others, newcomer]] == [(0, 3), (1, 3), (2, 3)]


def test_all_hear_of_a_newcomer_after_the_same_step(address: str, job_name: str, joining: Joining) -> None:
    began = [elastic(joining, name, rank, world_size=2) for rank, name in enumerate("ab")]
    group = began[0].result().group
    assert began[1].result().group == group
    clients = [
        Client(address, job=job_name, rank=rank, world_size=2, group=group, incarnation=name)
        for rank, name in enumerate("ab")
    ]
    for client in clients:
        client.open_job(W)
    clients[0].push_weight(0, W["w"])
    for client in clients:
        client.set_optimizer(lr=1.0)
    answers = {0: [], 1: [], 2: []}
    for number in range(3):
        for client in clients:
            answers[number].append(client.step(number).regroup_at)
            if (number, client.rank) == (0, 0):
                elastic(joining, "c", 0, world_size=2)
                # Nobody says when it has arrived.
                time.sleep(1.0)
    # One of the two had said its word for step 0 when the third came.
    assert answers == {0: [0, 2], 1: [2, 2], 2: [2, 2]}


def test_elastic_trainers_and_others_do_not_mix(joining: Joining) -> None:
    waiting = joining.join(0, 2)
    time.sleep(0.2)
    code, message = error_of(elastic(joining, "e", 1, world_size=2).result)
    assert (code, "with elastic=True and others are there without it" in message) == (REFUSED, True)
    joining.join(1)
    assert place(waiting) == (0, 2)


# ---------------------------------------------------------------- fencing


def test_who_passes_on_that_another_trainer_is_lost_hears_it_as_all_the_others_do(address: str, job_name: str) -> None:
    one, two = start_job(address, W, job=job_name, world_size=2, lr=1.0)
    one.call("EndGroup", reason="server elsewhere: rank 1 is lost: a test", passed_on=True)
    for client in (one, two):
        code, message = error_of(lambda client=client: client.step(0))
        assert (code, message) == (grpc.StatusCode.ABORTED, "server elsewhere: rank 1 is lost: a test")


def test_nothing_that_comes_late_from_a_group_that_ended_changes_anything(address: str, job_name: str) -> None:
    one, two = start_job(address, W, job=job_name, world_size=2, lr=1.0)
    one.push_gradient(0, torch.ones(4))
    two.call("EndGroup", reason="a test")
    new, other = connect_all(address, job=job_name)
    actions = {
        "Push": lambda: one.push_gradient(0, torch.ones(4), sequence=1),
        "Push of a weight": lambda: one.push_weight(0, torch.ones(4)),
        "Pull": lambda: one.pull(0),
        "Step": lambda: one.step(0),
        "AnnounceStep": lambda: one.announce(0),
        "ZeroGrad": lambda: one.call("ZeroGrad"),
        "GradNorm": lambda: one.call("GradNorm", norm_type=2.0, timeout_seconds=5),
        "Commit": lambda: one.call("Commit", timeout_seconds=5),
        "Restore": lambda: one.call("Restore"),
        "OpenJob": lambda: one.open_job(W),
        "SetOptimizer": lambda: one.set_optimizer(lr=2.0),
        "ClearState": lambda: one.call("ClearState", parameters=[0]),
        "ListState": lambda: one.call("ListState", timeout_seconds=5),
        "Plan": lambda: one.call("Plan"),
        "Barrier": lambda: one.call("Barrier", tag="t", timeout_seconds=5),
        "Heartbeat": lambda: one.call("Heartbeat"),
        "EndGroup": lambda: one.call("EndGroup"),
        "CloseSession": lambda: one.call("CloseSession"),
    }
    for what, action in actions.items():
        code, message = error_of(action)
        assert code == grpc.StatusCode.ABORTED, (what, code, message)
        assert f"rank 1 of job '{job_name}' is lost" in message, what
    assert error_of(lambda: two.step(0))[0] == grpc.StatusCode.NOT_FOUND
    # The successors are where the old ones were, with nothing of what these did.
    for client in (new, other):
        client.open_job(W)
        client.set_optimizer(lr=1.0)
    new.push_gradient(0, torch.full((4,), 2.0))
    for client in (new, other):
        client.step(0)
    assert torch.equal(new.pull(0, version=1), torch.full((4,), -1.0))


def test_a_session_of_an_older_group_is_refused(address: str, job_name: str, joining: Joining) -> None:
    old = joining.join(0, 1, incarnation="old").result()
    new = joining.join(0, 1, incarnation="new").result()
    for group in (old.group, 0xFFFFFFFFFFFFFFFF):
        code, _ = error_of(lambda group=group: Client(address, job=job_name, group=group, incarnation="old"))
        assert code in (grpc.StatusCode.ABORTED, grpc.StatusCode.INVALID_ARGUMENT)
    assert Client(address, job=job_name, group=new.group, incarnation="new").session_id == new.session_id
