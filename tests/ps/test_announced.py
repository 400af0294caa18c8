"""Announced steps: chunks are updated as soon as their gradients are final, and never a part of a step is kept."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import torch

from protos import zero_ps_pb2 as pb
from protos.values import encode_options
from ps import LocalCluster
from tests.ps.client import Client, connect_all, error_of, start_job

TWO = {"a": torch.zeros(2), "b": torch.zeros(2)}
ONES = torch.ones(2)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with LocalCluster(1, lease=30) as cluster:
        yield cluster.addresses[0]


def _groups(**options: float) -> list[pb.OptimizerGroup]:
    return [pb.OptimizerGroup(options=encode_options(options))]


def _refused(call, message: str) -> None:
    code, text = error_of(call)
    assert code == grpc.StatusCode.FAILED_PRECONDITION, text
    assert message in text


def test_a_final_gradient_is_used_before_the_step(address: str, job_name: str) -> None:
    (client,) = start_job(address, TWO, job=job_name, lr=1.0)
    client.push_gradient(0, ONES)
    client.announce()
    client.push_gradient(0, ONES, sequence=1, final=True)
    assert torch.equal(client.pull(0, version=1), -2 * ONES)
    assert torch.equal(client.pull(1, version=0), TWO["b"])
    assert "waited" in error_of(lambda: client.pull(1, version=1, timeout=0.2))[1]
    client.push_gradient(1, ONES)
    client.step(0)
    assert torch.equal(client.pull(1, version=1), -ONES)
    assert torch.equal(client.pull(0, version=1), -2 * ONES)
    # Gradients stay until they are zeroed, as after any other step.
    client.announce(1)
    client.push_gradient(1, ONES, step=1, final=True)
    assert torch.equal(client.pull(1, version=2), -3 * ONES)
    client.step(1)
    assert torch.equal(client.pull(0, version=2), -4 * ONES)


def test_a_step_may_drop_its_gradients_as_it_uses_them(address: str, job_name: str) -> None:
    one, two = start_job(address, TWO, job=job_name, world_size=2, lr=1.0)
    one.announce(zero_grad=True)
    two.announce()
    for client in (one, two):
        client.push_gradient(0, 2 * ONES, final=True)
    assert torch.equal(one.pull(0, version=1), -2 * ONES)
    # It was counted, however often it is sent.
    one.push_gradient(0, 2 * ONES, final=True)
    one.push_gradient(1, 2 * ONES)
    for client in (one, two):
        client.step(0)
    assert torch.equal(one.pull(1, version=1), -ONES)
    # Of one rank they are gone, of the other one they are used again.
    for client in (one, two):
        client.step(1)
    assert torch.equal(one.pull(0, version=2), -3 * ONES)
    assert torch.equal(one.pull(1, version=2), -ONES)


def test_an_announcement_that_is_taken_back_drops_nothing(address: str, job_name: str) -> None:
    (client,) = start_job(address, TWO, job=job_name, lr=1.0)
    client.push_gradient(0, ONES)
    client.announce(zero_grad=True)
    client.announce(withdraw=True)
    for step in range(2):
        client.step(step)
    assert torch.equal(client.pull(0, version=2), -2 * ONES)


def test_a_rank_may_leave_a_chunk_to_others(address: str, job_name: str) -> None:
    one, two = start_job(address, TWO, job=job_name, world_size=2, lr=1.0)
    one.announce(done=one.chunks(1))
    two.announce(done=two.chunks(0))
    one.push_gradient(0, 2 * ONES, final=True)
    assert torch.equal(two.pull(0, version=1), -ONES)
    assert "waited" in error_of(lambda: one.pull(1, version=1, timeout=0.2))[1]
    _refused(lambda: one.push_gradient(1, ONES), "are final and then sent another")
    two.push_gradient(1, 2 * ONES, final=True)
    assert torch.equal(one.pull(1, version=1), -ONES)
    for client in (one, two):
        client.step(0)
        client.call("ZeroGrad", step=1)
    # What is only left to others can be taken back.
    one.announce(1, done=one.chunks(1))
    one.announce(1, withdraw=True)
    for client in (one, two):
        client.push_gradient(1, 2 * ONES, step=1)
        client.step(1)
    assert torch.equal(one.pull(1, version=2), -3 * ONES)
    assert "no parameter 7" in error_of(lambda: one.announce(2, done=[pb.ChunkRef(parameter=7)]))[1]


def test_an_early_update_waits_for_every_rank_in_whatever_order_they_come(address: str, job_name: str) -> None:
    fast, slow = start_job(address, TWO, job=job_name, world_size=2, lr=1.0)
    fast.announce()
    fast.push_gradient(0, 3 * ONES, final=True)
    assert "waited" in error_of(lambda: fast.pull(0, version=1, timeout=0.2))[1]
    slow.push_gradient(0, ONES)
    slow.announce()
    assert "waited" in error_of(lambda: fast.pull(0, version=1, timeout=0.2))[1]
    # All of its gradients are final now, and what the other one said is enough for `a`.
    slow.step(0)
    assert torch.equal(fast.pull(0, version=1), -2 * ONES)
    assert "waited" in error_of(lambda: fast.pull(1, version=1, timeout=0.2))[1]
    fast.push_gradient(1, 2 * ONES, final=True)
    assert torch.equal(slow.pull(1, version=1), -ONES)
    fast.step(0)
    for client in (fast, slow):
        client.call("ZeroGrad", step=1)
    # The last word may be an announcement.
    fast.announce(1)
    fast.push_gradient(1, 2 * ONES, step=1, final=True)
    slow.push_gradient(1, 2 * ONES, step=1)
    slow.step(1)
    assert torch.equal(slow.pull(1, version=2), -3 * ONES)
    fast.step(1)
    assert torch.equal(slow.pull(0, version=2), -2 * ONES)


def test_a_rank_may_zero_what_was_updated_while_another_one_still_computes(address: str, job_name: str) -> None:
    fast, slow = start_job(address, TWO, job=job_name, world_size=2, lr=1.0)
    for client in (fast, slow):
        client.announce()
        client.push_gradient(0, ONES, final=True)
    fast.push_gradient(1, ONES, final=True)
    fast.step(0)
    fast.pull(0, version=1)
    fast.call("ZeroGrad", step=1)
    slow.push_gradient(1, ONES, final=True)
    slow.step(0)
    assert torch.equal(slow.pull(1, version=1), -ONES)
    slow.call("ZeroGrad", step=1)
    for client in (fast, slow):
        client.step(1)
    assert torch.equal(slow.pull(0, version=2), -ONES)
    assert torch.equal(slow.pull(1, version=2), -ONES)


def test_a_rank_may_be_a_whole_backward_ahead_of_another_where_chunks_allow_it(address: str, job_name: str) -> None:
    """It uses a part of the model, which is updated already."""
    fast, slow = start_job(address, TWO, job=job_name, world_size=2, lr=1.0)
    for client in (fast, slow):
        client.announce()
        client.push_gradient(0, ONES, final=True)
    fast.step(0)
    fast.pull(0, version=1)
    fast.call("ZeroGrad", step=1)
    with ThreadPoolExecutor() as pool:
        ahead = pool.submit(fast.push_gradient, 0, ONES, step=1)
        time.sleep(0.2)
        assert not ahead.done()
        slow.step(0)
        ahead.result(20)
    slow.call("ZeroGrad", step=1)
    for client in (fast, slow):
        client.step(1)
    assert torch.equal(slow.pull(0, version=2), -1.5 * ONES)
    assert torch.equal(slow.pull(1, version=2), TWO["b"])


def test_early_updates_give_the_bits_of_plain_torch(address: str, job_name: str) -> None:
    torch.manual_seed(0)
    parameters = {"a": torch.randn(()), "b": torch.randn(1200, 1001), "c": torch.randn(17, 3), "d": torch.randn(90_000)}
    clients = start_job(address, parameters, "AdamW", job=job_name, world_size=2, lr=0.1)
    plain = [p.clone() for p in parameters.values()]
    reference = torch.optim.AdamW(plain, lr=0.1, fused=True)
    for step in range(3):
        for client in clients:
            client.announce(step)
        for number in reversed(range(4)):
            gradients = [torch.randn_like(plain[number]) for _ in clients]
            plain[number].grad = (gradients[0] + gradients[1]) / 2
            # The order of arrival does not matter, nor who says that it is final.
            for rank in (1, 0) if number % 2 else (0, 1):
                clients[rank].push_gradient(number, gradients[rank], step=step, final=number != 2)
        reference.step()
        for client in clients:
            client.step(step)
            client.call("ZeroGrad", step=step + 1)
        for number, parameter in enumerate(plain):
            assert torch.equal(clients[1].pull(number, version=step + 1), parameter)


# ---------------------------------------------------------------- refused


def test_what_would_change_the_step_is_refused_once_it_is_announced(address: str, job_name: str) -> None:
    (client,) = start_job(address, TWO, job=job_name, lr=1.0)
    _refused(lambda: client.push_gradient(0, ONES, final=True), "which it has not announced")
    client.announce()
    client.announce()
    client.push_gradient(0, ONES, final=True)
    client.pull(0, version=1)
    _refused(lambda: client.push_gradient(0, ONES, sequence=1, final=True), "came at version 1")
    _refused(lambda: client.call("ZeroGrad"), "zeroes gradients after it announced the step")
    _refused(lambda: client.call("GradNorm", norm_type=2.0, timeout_seconds=5), "asks for norms after it announced")
    _refused(lambda: client.announce(groups=_groups(lr=2.0)), "option 'lr' of group 0 1.0 and now names 2.0")
    _refused(lambda: client.step(0, groups=_groups(lr=2.0)), "what was announced cannot change")
    edits = [pb.GradEdit(parameters=[0], scale=0.5)]
    _refused(lambda: client.step(0, edits=edits), "what was announced cannot change")
    _refused(lambda: client.call("AnnounceStep", withdraw=True), "after it sent a final gradient")
    _refused(lambda: client.push_weight(0, ONES), "came at version 1")
    assert "is gone" in error_of(lambda: client.call("Commit", step=0, timeout_seconds=5))[1]
    assert "is gone" in error_of(lambda: client.call("Commit", step=0, timeout_seconds=5, announce=True))[1]
    client.step(0)
    assert torch.equal(client.pull(0, version=1), -ONES)
    client.call("Commit", step=1, timeout_seconds=5)


def test_a_final_gradient_that_is_sent_again_is_acknowledged(address: str, job_name: str) -> None:
    (client,) = start_job(address, TWO, job=job_name, lr=1.0)
    client.announce()
    client.push_gradient(0, ONES, final=True)
    client.pull(0, version=1)
    client.push_gradient(0, ONES, final=True)
    client.step(0)
    assert torch.equal(client.pull(0, version=1), -ONES)


def test_an_announcement_can_be_taken_back_before_anything_is_final(address: str, job_name: str) -> None:
    one, two = start_job(address, TWO, job=job_name, world_size=2, lr=1.0)
    for client in (one, two):
        client.announce()
    two.push_gradient(0, ONES, final=True)
    one.call("AnnounceStep", withdraw=True)
    one.push_gradient(0, ONES)
    one.call("ZeroGrad")
    # Another learning rate is for all ranks to agree on.
    _refused(lambda: one.announce(groups=_groups(lr=0.5)), "trainers disagree on step 0")
    one.push_gradient(0, 3 * ONES)
    one.step(0)
    assert torch.equal(one.pull(0, version=1), -2 * ONES)
    two.step(0)
    assert torch.equal(one.pull(1, version=1), TWO["b"])


def test_ranks_that_announce_different_options_are_told_which(address: str, job_name: str) -> None:
    one, two = start_job(address, TWO, job=job_name, world_size=2, lr=1.0)
    one.announce()
    one.push_gradient(0, ONES, final=True)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(error_of, lambda: one.pull(0, version=1))
        for action in (lambda: two.announce(groups=_groups(lr=0.5)), lambda: two.step(0, groups=_groups(lr=0.5))):
            _refused(action, "option 'lr' of group 0 is 1.0 on rank 0 and 0.5 on rank 1")
        assert "trainers disagree" in waiting.result()[1]
    assert torch.equal(one.pull(0, version=0), TWO["a"])
    for client in (two, one):
        client.step(0)
    assert torch.equal(one.pull(0, version=1), -0.5 * ONES)


# ---------------------------------------------------------------- lost trainers


def test_a_trainer_lost_before_anything_moved_leaves_a_state_to_go_on_with(address: str, job_name: str) -> None:
    one, two = start_job(address, TWO, job=job_name, world_size=2, lr=1.0)
    for client in (one, two):
        client.announce()
    one.push_gradient(0, ONES, final=True)
    two.call("EndGroup", reason="a test")
    one, two = connect_all(address, job=job_name)
    assert two.opened.step == 0
    for client in (one, two):
        client.open_job(TWO)
        client.set_optimizer(lr=1.0)
    one.announce()
    one.push_gradient(0, ONES, final=True)
    assert "rank 0 announced the next step" in error_of(lambda: two.set_optimizer(lr=2.0))[1]
    two.announce()
    two.push_gradient(0, ONES, final=True)
    assert torch.equal(one.pull(0, version=1), -ONES)
    for client in (one, two):
        client.step(0)
    one.pull(1, version=1)


def test_a_trainer_lost_in_the_middle_of_a_step_makes_the_state_useless(address: str, job_name: str) -> None:
    one, two = start_job(address, TWO, job=job_name, world_size=2, lr=1.0)
    one.call("Commit", step=0, timeout_seconds=10)
    for client in (one, two):
        client.announce()
        client.push_gradient(0, ONES, final=True)
    one.pull(0, version=1)
    two.call("EndGroup", reason="a test")
    code, message = error_of(lambda: one.pull(1, version=1))
    assert code == grpc.StatusCode.ABORTED
    assert "rank 1 of job" in message
    # The state is what a restore makes of it, and the half step is never seen.
    one, two = connect_all(address, job=job_name)
    assert [one.opened.step, two.opened.step] == [-1, -1]
    two.call("Restore", step=0)
    for client in (one, two):
        client.open_job(TWO)
        client.set_optimizer(lr=1.0)
        client.announce()
        client.push_gradient(0, ONES, final=True)
    assert torch.equal(one.pull(0, version=1), -ONES)
    for client in (one, two):
        client.step(0)
    assert torch.equal(one.pull(1, version=1), TWO["b"])


def test_a_half_done_step_without_a_commit_begins_the_job_anew(address: str, job_name: str) -> None:
    (client,) = start_job(address, TWO, job=job_name, lr=1.0)
    client.announce()
    client.push_gradient(0, ONES, final=True)
    client.pull(0, version=1)
    client.close()
    again = Client(address, job=job_name)
    assert again.opened.step == -1
    assert again.open_job(TWO).needs_weights


def test_a_reader_comes_in_when_the_step_is_whole(address: str, job_name: str) -> None:
    (client,) = start_job(address, TWO, job=job_name, lr=1.0)
    client.announce()
    client.push_gradient(0, ONES, final=True)
    client.pull(0, version=1)
    code, message = error_of(lambda: Client(address, job=job_name, read_only=True, timeout=0.3))
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert f"waited 0.3 s for updates to step 1 of job {job_name!r}, which is at 0" in message
    with ThreadPoolExecutor() as pool:
        reader = pool.submit(Client, address, job=job_name, read_only=True)
        client.step(0)
        assert reader.result().opened.step == 1


# ---------------------------------------------------------------- commits and limited memory


def test_a_commit_that_was_announced_has_the_state_before_the_early_updates(address: str, job_name: str) -> None:
    torch.manual_seed(0)
    large = {f"p{i}": torch.randn(1_000_000) for i in range(6)}
    (client,) = start_job(address, large, "AdamW", job=job_name, lr=1.0)
    values: dict[int, list[torch.Tensor]] = {}
    for step in range(3):
        commit = {"step": step, "commit_id": f"{step:x}", "timeout_seconds": 20}
        if step:
            client.call("Commit", announce=True, **commit)
        client.announce(step)
        for number in range(6):
            client.push_gradient(number, torch.ones(1_000_000), step=step, final=True)
        client.step(step)
        client.call("ZeroGrad", step=step + 1)
        values[step + 1] = [client.pull(number, version=step + 1) for number in range(6)]
        if step:
            client.call("Commit", **commit)
    client.call("Restore", step=2, commit_id="2")
    client.open_job(large)
    for number in range(6):
        assert torch.equal(client.pull(number, version=2), values[2][number])


def test_early_updates_under_a_memory_limit_give_the_same_bits(job_name: str, tmp_path) -> None:
    torch.manual_seed(0)
    large = {f"p{i}": torch.randn(1_000_000) for i in range(12)}
    gradients = [torch.randn(1_000_000) for _ in range(12)]
    plain = [p.clone() for p in large.values()]
    reference = torch.optim.AdamW(plain, lr=0.1, fused=True)
    with LocalCluster(1, data_dir=tmp_path, memory=64 << 20) as cluster:
        (client,) = start_job(cluster.addresses[0], large, "AdamW", job=job_name, lr=0.1)
        for step in range(3):
            for number in range(12):
                client.pull(number, version=step)
            client.announce(step)
            for number in reversed(range(12)):
                client.push_gradient(number, gradients[number], step=step, final=number > 1)
                plain[number].grad = gradients[number]
            client.step(step)
            client.call("ZeroGrad", step=step + 1)
            reference.step()
        for number, parameter in enumerate(plain):
            assert torch.equal(client.pull(number, version=3), parameter)
