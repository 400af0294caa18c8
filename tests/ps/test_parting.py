"""A trainer that closes after its last step: what it contributed counts for those who have still to ask for it."""

import time
from collections.abc import Iterator

import grpc
import pytest
import torch

from protos import PROTOCOL_VERSION
from protos import zero_ps_pb2 as pb
from ps import LocalCluster
from tests.ps.client import Client, error_of, start_job

W = {"w": torch.zeros(4)}
HALF = torch.full((4,), -0.5)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with LocalCluster(1, lease=20) as cluster:
        yield cluster.addresses[0]


def leave_after_step(client: Client, step: int = 0) -> None:
    client.step(step)
    client.call("CloseSession", step=step + 1)


def test_the_step_is_made_with_what_it_contributed(address: str, job_name: str) -> None:
    stays, leaves = start_job(address, W, job=job_name, world_size=2, lr=1.0)
    leaves.push_gradient(0, torch.ones(4))
    leave_after_step(leaves)
    stays.step(0)
    assert torch.equal(stays.pull(0, version=1), HALF)
    # The one after that cannot be.
    stays.step(1)
    code, message = error_of(lambda: stays.pull(0, version=2, timeout=60))
    assert code == grpc.StatusCode.ABORTED
    assert f"rank 1 of job '{job_name}' is lost: its trainer closed it" in message


def test_nobody_is_told_that_it_is_lost_while_a_third_one_has_still_to_ask(address: str, job_name: str) -> None:
    first, leaves, last = start_job(address, W, job=job_name, world_size=3, lr=1.0)
    leaves.push_gradient(0, torch.full((4,), 3.0))
    leave_after_step(leaves)
    first.step(0)
    waiting = first.send_pull([0], version=1)
    time.sleep(0.3)
    last.step(0)
    assert torch.frombuffer(bytearray(first.receive(waiting, 16)), dtype=torch.float32).tolist() == [-1.0] * 4


def test_all_but_one_may_leave(address: str, job_name: str) -> None:
    clients = start_job(address, W, job=job_name, world_size=3, lr=1.0)
    for client in clients[:2]:
        client.push_gradient(0, torch.full((4,), 1.5))
        leave_after_step(client)
    clients[2].step(0)
    assert torch.equal(clients[2].pull(0, version=1), torch.full((4,), -1.0))


def test_norms_have_its_gradients_in_them(address: str, job_name: str) -> None:
    stays, leaves = start_job(address, W, job=job_name, world_size=2, lr=1.0)
    leaves.push_gradient(0, torch.ones(4))
    leave_after_step(leaves)
    asked = {"norm_type": 2.0, "timeout_seconds": 20}
    assert stays.call("GradNorm", **asked).chunk_norms == [1.0]
    # One that began anew will never meet the other again.
    stays.call("ZeroGrad")
    code, message = error_of(lambda: stays.call("GradNorm", **asked))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "rank 1 asked for step 0 and left" in message
    stays.step(0)
    assert torch.equal(stays.pull(0, version=1), HALF)


def test_a_norm_that_it_was_told_the_others_are_told_too(address: str, job_name: str) -> None:
    """It drops the step for that norm's sake, and leaves, when the answer is on its way to the others."""
    stays, leaves = start_job(address, W, job=job_name, world_size=2, lr=1.0)
    asked = {"norm_type": 2.0, "timeout_seconds": 20}
    leaves.push_gradient(0, torch.full((4,), torch.inf))
    waiting = stays.stub.GradNorm.future(request("GradNorm", stays, **asked), timeout=30)
    assert leaves.call("GradNorm", **asked).chunk_norms == [torch.inf]
    leaves.call("CloseSession")
    assert waiting.result().chunk_norms == [torch.inf]
    assert stays.call("GradNorm", **asked).chunk_norms == [torch.inf]


def test_an_announced_step_is_finished_without_it(address: str, job_name: str) -> None:
    stays, leaves = start_job(address, W, job=job_name, world_size=2, lr=1.0)
    for client in (stays, leaves):
        client.announce()
    leaves.push_gradient(0, torch.ones(4), final=True)
    leave_after_step(leaves)
    stays.push_gradient(0, torch.zeros(4), final=True)
    # Updated before this one has asked for the step.
    assert torch.equal(stays.pull(0, version=1), HALF)
    stays.step(0)
    stays.call("Commit", step=1, timeout_seconds=20)


def test_one_that_did_not_get_its_word_to_every_server_takes_its_contribution_along(
    address: str, job_name: str
) -> None:
    stays, leaves = start_job(address, W, job=job_name, world_size=2, lr=1.0)
    leaves.push_gradient(0, torch.ones(4))
    leaves.step(0)
    # Its call to another server failed, so that it is not at step 1.
    leaves.call("CloseSession", step=0)
    stays.step(0)
    code, message = error_of(lambda: stays.pull(0, version=1, timeout=60))
    assert code == grpc.StatusCode.ABORTED
    assert f"rank 1 of job '{job_name}' is lost" in message


def test_what_it_sent_for_a_step_that_it_did_not_ask_for_is_dropped(address: str, job_name: str) -> None:
    stays, leaves = start_job(address, W, job=job_name, world_size=2, lr=1.0)
    for client in (stays, leaves):
        client.step(0)
    leaves.push_gradient(0, torch.ones(4), step=1)
    leaves.call("CloseSession", step=1)
    stays.step(1)
    assert error_of(lambda: stays.pull(0, version=2, timeout=60))[0] == grpc.StatusCode.ABORTED


def test_it_does_not_count_at_barriers(address: str, job_name: str) -> None:
    stays, leaves = start_job(address, W, job=job_name, world_size=2, lr=1.0)
    leave_after_step(leaves)
    code, message = error_of(lambda: stays.call("Barrier", timeout=60, tag="t", timeout_seconds=60))
    assert code == grpc.StatusCode.ABORTED
    assert "rank 1" in message and "closed" in message


def test_it_is_dropped_when_another_one_is_lost(address: str, job_name: str) -> None:
    stays, leaves = start_job(address, W, job=job_name, world_size=2, lr=1.0)
    leaves.push_gradient(0, torch.ones(4))
    leave_after_step(leaves)
    stays.call("EndGroup", reason="a test")
    again = start_job(address, W, job=job_name, world_size=2, lr=1.0)
    for client in again:
        client.step(0)
    assert torch.equal(again[0].pull(0, version=1), torch.zeros(4))


def test_it_is_dropped_when_nobody_is_left_to_make_the_step(address: str, job_name: str) -> None:
    stays, leaves = start_job(address, W, job=job_name, world_size=2, lr=1.0)
    leaves.push_gradient(0, torch.ones(4))
    leave_after_step(leaves)
    stays.close()
    again = start_job(address, W, job=job_name, world_size=2, lr=1.0)
    for client in again:
        client.step(0)
    assert torch.equal(again[0].pull(0, version=1), torch.zeros(4))


def request(method: str, client: Client, **fields):
    return getattr(pb, f"{method}Request")(session_id=client.session_id, **fields)


def test_its_successor_waits_until_the_others_have_made_the_step(address: str, job_name: str) -> None:
    stays, leaves = start_job(address, W, job=job_name, world_size=2, lr=1.0)
    leaves.push_gradient(0, torch.ones(4))
    leave_after_step(leaves)
    join = pb.JoinGroupRequest(
        protocol_version=PROTOCOL_VERSION,
        job=job_name,
        incarnation="successor",
        rank=1,
        world_size=2,
        num_shards=1,
        timeout_seconds=0.5,
    )
    code, message = error_of(lambda: stays.stub.JoinGroup(join, timeout=20))
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "for ranks [0] of job" in message and "to make the step that rank 1 asked for before it left" in message
    join.timeout_seconds = 20
    successor = stays.stub.JoinGroup.future(join, timeout=40)
    time.sleep(0.3)
    stays.step(0)
    assert torch.equal(stays.pull(0, version=1), HALF)
    stays.call("CloseSession", step=1)
    join.rank, join.incarnation = 0, "other"
    assert stays.stub.JoinGroup(join, timeout=40).group == successor.result().group
