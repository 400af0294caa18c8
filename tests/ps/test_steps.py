"""Steps: what makes one begin, what it does to gradients, and how one fails."""

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import torch

from protos import zero_ps_pb2 as pb
from protos.layout import ChunkGrid
from protos.values import encode_options
from ps import LocalCluster
from tests.ps.client import Client, connect_all, error_of, spec, start_job

W = {"w": torch.arange(4.0)}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with LocalCluster(1, lease=30) as cluster:
        yield cluster.addresses[0]


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "RMSprop"])
def test_training_gives_the_bits_of_plain_torch(address: str, job_name: str, optimizer: str) -> None:
    torch.manual_seed(0)
    parameters = {"a": torch.randn(()), "b": torch.randn(1200, 1001), "c": torch.randn(17, 3)}
    (client,) = start_job(address, parameters, optimizer, job=job_name, lr=0.1, weight_decay=0.1)
    plain = [p.clone() for p in parameters.values()]
    fused = {} if optimizer == "RMSprop" else {"fused": True}
    reference = getattr(torch.optim, optimizer)(plain, lr=0.1, weight_decay=0.1, **fused)
    for step in range(4):
        for number, parameter in enumerate(plain):
            parameter.grad = torch.randn_like(parameter)
            client.push_gradient(number, parameter.grad, step=step)
        reference.step()
        client.step(step)
        client.call("ZeroGrad", step=step + 1)
        for number, parameter in enumerate(plain):
            assert torch.equal(client.pull(number, version=step + 1), parameter)


def test_a_step_needs_the_word_of_every_rank(address: str, job_name: str) -> None:
    clients = start_job(address, W, job=job_name, world_size=3, lr=1.0)
    for client in clients:
        client.push_gradient(0, torch.ones(4))
    for client in clients[:2]:
        client.step(0)
    assert "waited" in error_of(lambda: clients[0].pull(0, version=1, timeout=0.3))[1]
    assert torch.equal(clients[0].pull(0, version=0), W["w"])
    clients[2].step(0)
    assert torch.equal(clients[0].pull(0, version=1), W["w"] - 1)


def test_a_rank_that_skips_a_batch_waits_for_the_others(address: str, job_name: str) -> None:
    """It gives its word for two steps without a pull between them."""
    one, two = start_job(address, W, job=job_name, world_size=2, lr=1.0)
    two.step(0)
    with ThreadPoolExecutor() as pool:
        ahead = pool.submit(two.step, 1)
        time.sleep(0.3)
        assert not ahead.done()
        for step in range(2):
            one.push_gradient(0, torch.full((4,), 2.0), step=step)
            one.step(step)
            one.call("ZeroGrad", step=step + 1)
        ahead.result(10)
    assert torch.equal(one.pull(0, version=2), W["w"] - 2)
    assert "at step 5" in error_of(lambda: two.step(5))[1]


def test_repeating_a_step_changes_nothing(address: str, job_name: str) -> None:
    one, two = start_job(address, W, job=job_name, world_size=2, lr=1.0)
    one.push_gradient(0, torch.ones(4))
    for client in (one, one, two, two, one):
        client.step(0)
    assert torch.equal(one.pull(0, version=1), W["w"] - 0.5)
    assert "waited" in error_of(lambda: one.pull(0, version=2, timeout=0.3))[1]


def test_a_step_from_another_version_is_refused(address: str, job_name: str) -> None:
    (client,) = start_job(address, W, job=job_name)
    code, message = error_of(lambda: client.step(3))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "rank 0 is at step 3" in message


def test_ranks_that_disagree_about_options_are_told_which(address: str, job_name: str) -> None:
    one, two = start_job(address, W, job=job_name, world_size=2, lr=1.0)
    one.step(0)
    other = [pb.OptimizerGroup(options=encode_options({"lr": 0.5}))]
    for action in (lambda: two.step(0, groups=other), lambda: one.pull(0, version=1)):
        code, message = error_of(action)
        assert code == grpc.StatusCode.FAILED_PRECONDITION
        assert "option 'lr' of group 0 is 1.0 on rank 0 and 0.5 on rank 1" in message
    # It is not too late to agree.
    two.step(0)
    one.pull(0, version=1)


def test_the_options_of_a_step_count_for_that_step(address: str, job_name: str) -> None:
    (client,) = start_job(address, {"w": torch.zeros(2)}, job=job_name, lr=1.0)
    client.push_gradient(0, torch.ones(2))
    for step, rate in enumerate((1.0, 0.25, 0.5)):
        client.step(step, groups=[pb.OptimizerGroup(options=encode_options({"lr": rate}))])
    assert torch.equal(client.pull(0, version=3), torch.full((2,), -1.75))


def test_buffers_and_what_has_no_gradient_stay_as_they_are(address: str, job_name: str) -> None:
    (client,) = (Client(address, job=job_name),)
    specs = [
        spec("w", torch.zeros(3)),
        spec("idle", torch.zeros(3)),
        spec("running_mean", torch.zeros(3), buffer=True),
    ]
    client.manifest = client.call("OpenJob", manifest=pb.Manifest(parameters=specs)).manifest
    for number in range(3):
        client.push_weight(number, torch.full((3,), 1.0 + number))
    client.set_optimizer("AdamW", parameters=[0, 1], weight_decay=0.5)
    client.push_gradient(0, torch.ones(3))
    client.step(0)
    assert not torch.equal(client.pull(0, version=1), torch.ones(3))
    assert torch.equal(client.pull(1, version=1), torch.full((3,), 2.0))
    assert torch.equal(client.pull(2, version=1), torch.full((3,), 3.0))
    code, message = error_of(lambda: client.push_gradient(2, torch.ones(3), step=1))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "'running_mean' is a buffer" in message


# ---------------------------------------------------------------- zero_grad


def test_gradients_stay_until_they_are_zeroed(address: str, job_name: str) -> None:
    (client,) = start_job(address, {"w": torch.zeros(2)}, job=job_name, lr=1.0)
    client.push_gradient(0, torch.ones(2))
    client.step(0)
    client.step(1)
    client.call("ZeroGrad", step=2)
    client.step(2)
    client.push_gradient(0, torch.ones(2), step=3)
    client.step(3)
    assert torch.equal(client.pull(0, version=4), torch.full((2,), -3.0))


def test_zeroing_right_after_a_step_leaves_that_step_alone(address: str, job_name: str) -> None:
    torch.manual_seed(0)
    large = {f"p{i}": torch.zeros(1_000_000) for i in range(8)}
    (client,) = start_job(address, large, job=job_name, lr=1.0)
    for number in range(8):
        client.push_gradient(number, torch.ones(1_000_000))
    client.step(0)
    client.call("ZeroGrad", step=1)
    client.step(1)
    for number in range(8):
        assert torch.equal(client.pull(number, version=2), torch.full((1_000_000,), -1.0))


def test_one_rank_may_zero_while_another_still_computes(address: str, job_name: str) -> None:
    fast, slow = start_job(address, {"w": torch.zeros(2)}, job=job_name, world_size=2, lr=1.0)
    fast.push_gradient(0, torch.ones(2))
    fast.step(0)
    fast.call("ZeroGrad", step=1)
    slow.push_gradient(0, torch.ones(2))
    slow.step(0)
    slow.call("ZeroGrad", step=1)
    assert torch.equal(slow.pull(0, version=1), torch.full((2,), -1.0))
    for client in (fast, slow):
        client.step(1)
    assert torch.equal(slow.pull(0, version=2), torch.full((2,), -1.0))


def test_some_gradients_can_be_zeroed_and_sent_anew(address: str, job_name: str) -> None:
    (client,) = start_job(address, {"a": torch.zeros(2), "b": torch.zeros(2)}, job=job_name, lr=1.0)
    for number in range(2):
        client.push_gradient(number, torch.ones(2))
    client.call("ZeroGrad", step=0, parameters=[1])
    client.push_gradient(1, torch.full((2,), 5.0), sequence=0)
    client.step(0)
    assert torch.equal(client.pull(0, version=1), torch.full((2,), -1.0))
    assert torch.equal(client.pull(1, version=1), torch.full((2,), -5.0))


def test_a_late_zero_grad_changes_nothing(address: str, job_name: str) -> None:
    (client,) = start_job(address, {"w": torch.zeros(2)}, job=job_name, lr=1.0)
    client.step(0)
    client.pull(0, version=1)
    client.push_gradient(0, torch.ones(2), step=1)
    code, message = error_of(lambda: client.call("ZeroGrad", step=0))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "zeroes gradients of step 0 but is at step 1" in message
    client.step(1)
    assert torch.equal(client.pull(0, version=2), torch.full((2,), -1.0))


# ---------------------------------------------------------------- clipping


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
def test_norms_are_of_the_averaged_gradient(address: str, job_name: str, norm_type: float) -> None:
    torch.manual_seed(0)
    parameters = {"a": torch.zeros(1_300_000, 2), "idle": torch.zeros(3), "b": torch.zeros(())}
    clients = start_job(address, parameters, job=job_name, world_size=2, lr=1.0)
    gradients = [[torch.randn(1_300_000, 2), None, torch.randn(())] for _ in clients]
    for client, sent in zip(clients, gradients, strict=True):
        for number in (0, 2):
            client.push_gradient(number, sent[number])
    with ThreadPoolExecutor() as pool:
        calls = [pool.submit(c.call, "GradNorm", norm_type=norm_type, timeout_seconds=20) for c in clients]
        one, two = (list(call.result().chunk_norms) for call in calls)
    assert one == two
    assert len(one) == 4  # 'a' has two chunks.
    average = (gradients[0][0] + gradients[1][0]) / 2
    halves = average.split(ChunkGrid.of(average.shape).chunk_rows)
    assert one[:2] == [float(torch.linalg.vector_norm(half, norm_type)) for half in halves]
    assert one[2] == 0
    assert one[3] == float(((gradients[0][2] + gradients[1][2]) / 2).abs())


def test_gradients_are_scaled_before_the_update(address: str, job_name: str) -> None:
    parameters = {"a": torch.zeros(2), "b": torch.zeros(2)}
    clients = start_job(address, parameters, job=job_name, world_size=2, lr=1.0)
    for client in clients:
        for number in range(2):
            client.push_gradient(number, torch.full((2,), 8.0))
    for client in clients:
        client.step(0, edits=[pb.GradEdit(parameters=[1], scale=0.25)])
    assert torch.equal(clients[0].pull(0, version=1), torch.full((2,), -8.0))
    assert torch.equal(clients[0].pull(1, version=1), torch.full((2,), -2.0))


def test_gradients_that_are_not_finite_scale_by_nan_as_in_torch(address: str, job_name: str) -> None:
    clients = start_job(address, {"w": torch.zeros(2)}, job=job_name, world_size=2, lr=1.0)
    for client in clients:
        client.push_gradient(0, torch.full((2,), math.inf))
    for client in clients:
        client.step(0, edits=[pb.GradEdit(parameters=[0], scale=math.nan)])
    assert clients[0].pull(0, version=1).isnan().all()


def test_after_the_norm_a_gradient_is_final_until_it_is_zeroed(address: str, job_name: str) -> None:
    (client,) = start_job(address, {"w": torch.zeros(2)}, job=job_name, lr=1.0)
    client.push_gradient(0, torch.ones(2))
    client.call("GradNorm", norm_type=2.0, timeout_seconds=5)
    code, message = error_of(lambda: client.push_gradient(0, torch.ones(2), sequence=1))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "are final" in message
    client.call("ZeroGrad", step=0)
    client.push_gradient(0, torch.full((2,), 3.0))
    assert list(client.call("GradNorm", norm_type=math.inf, timeout_seconds=5).chunk_norms) == [3.0]
    client.step(0)
    assert torch.equal(client.pull(0, version=1), torch.full((2,), -3.0))


def _norm(client: Client, norm_type: float = math.inf, timeout: float = 20) -> list[float]:
    return list(client.call("GradNorm", norm_type=norm_type, timeout_seconds=timeout).chunk_norms)


def _norms(clients: list[Client], norm_type: float = math.inf) -> list[list[float]]:
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda client: _norm(client, norm_type), clients))


def test_a_norm_after_zeroing_waits_for_a_rank_that_is_late_to_zero(address: str, job_name: str) -> None:
    """Gradients were bad, all ranks drop them and compute others: old and new ones are never averaged."""
    one, two = start_job(address, {"w": torch.zeros(2)}, job=job_name, world_size=2, lr=1.0)
    for repeat, (first, second) in enumerate([(100.0, 100.0), (3.0, 5.0), (1.0, 2.0)]):
        if repeat:
            one.call("ZeroGrad")
        one.push_gradient(0, torch.full((2,), first))
        with ThreadPoolExecutor() as pool:
            early = pool.submit(_norm, one)
            time.sleep(0.3)
            assert not early.done()
            if repeat:
                two.call("ZeroGrad")
            two.push_gradient(0, torch.full((2,), second))
            assert _norm(two) == early.result() == [(first + second) / 2]
    for client in (one, two):
        client.step(0)
    assert torch.equal(one.pull(0, version=1), torch.full((2,), -1.5))


def test_a_norm_that_one_rank_has_got_is_there_for_the_others_after_it_zeroed(address: str, job_name: str) -> None:
    one, two = start_job(address, {"w": torch.zeros(4)}, job=job_name, world_size=2)
    for client in (one, two):
        client.push_gradient(0, torch.ones(4))
    assert _norms([one, two]) == [[1.0], [1.0]]
    assert _norm(one, 2.0) == [2.0]
    one.call("ZeroGrad")
    assert _norm(two, 2.0, timeout=5) == [2.0]


def test_that_holds_for_norms_of_gradients_that_were_scaled_by_nan(address: str, job_name: str) -> None:
    """As after clipping what is not finite, when one rank already skips the step."""
    one, two = start_job(address, {"w": torch.zeros(4)}, job=job_name, world_size=2)
    for client in (one, two):
        client.push_gradient(0, torch.ones(4))
    assert _norms([one, two]) == [[1.0], [1.0]]
    edits = [pb.GradEdit(parameters=[0], scale=math.nan)]
    for client in (one, two):
        (norm,) = client.call("GradNorm", norm_type=2.0, timeout_seconds=5, edits=edits).chunk_norms
        assert math.isnan(norm)
        client.call("ZeroGrad")


def test_norms_are_of_what_earlier_edits_made_of_gradients(address: str, job_name: str) -> None:
    (client,) = start_job(address, {"w": torch.zeros(2), "v": torch.zeros(2)}, job=job_name, lr=1.0)
    for number in range(2):
        client.push_gradient(number, torch.tensor([3.0, -4.0]))
    edits = [pb.GradEdit(parameters=[0], max_value=3.5), pb.GradEdit(parameters=[0], scale=0.5)]
    for _ in range(2):
        assert list(client.call("GradNorm", norm_type=1.0, edits=edits, timeout_seconds=5).chunk_norms) == [3.25, 7.0]
    client.step(0, edits=edits)
    assert torch.equal(client.pull(0, version=1), torch.tensor([-1.5, 1.75]))
    assert torch.equal(client.pull(1, version=1), torch.tensor([-3.0, 4.0]))


def test_ranks_may_zero_different_parameters(address: str, job_name: str) -> None:
    one, two = start_job(address, {"a": torch.zeros(2), "b": torch.zeros(2)}, job=job_name, world_size=2)
    for client in (one, two):
        for number in range(2):
            client.push_gradient(number, torch.full((2,), 8.0))
    assert _norms([one, two]) == [[8.0, 8.0]] * 2
    one.call("ZeroGrad", parameters=[0])
    two.call("ZeroGrad", parameters=[1])
    two.call("ZeroGrad", parameters=[0])
    one.push_gradient(0, torch.full((2,), 2.0))
    assert _norms([one, two]) == [[1.0, 4.0]] * 2


def test_a_rank_that_has_nothing_to_zero_need_not(address: str, job_name: str) -> None:
    one, two = start_job(address, {"w": torch.zeros(2)}, job=job_name, world_size=2)
    one.push_gradient(0, torch.full((2,), 2.0))
    assert _norms([one, two]) == [[1.0]] * 2
    one.call("ZeroGrad")
    one.push_gradient(0, torch.full((2,), 6.0))
    assert _norms([one, two]) == [[3.0]] * 2


def test_epochs_of_a_step_begin_anew_with_the_next_one_and_with_a_new_trainer(address: str, job_name: str) -> None:
    one, two = start_job(address, {"w": torch.zeros(2)}, job=job_name, world_size=2, lr=1.0)
    assert _norms([one, two]) == [[0.0]] * 2
    one.call("ZeroGrad")
    for client in (one, two):
        client.step(0)
    assert _norm_at_1(one, two) == [[0.0]] * 2
    one.call("ZeroGrad", step=1)
    one, two = connect_all(address, job=job_name)
    for client in (one, two):
        client.open_job({"w": torch.zeros(2)})
    assert _norm_at_1(one, two) == [[0.0]] * 2


def _norm_at_1(*clients: Client) -> list[list[float]]:
    with ThreadPoolExecutor() as pool:
        calls = [pool.submit(c.call, "GradNorm", step=1, norm_type=2.0, timeout_seconds=5) for c in clients]
        return [list(call.result().chunk_norms) for call in calls]


def test_a_rank_that_gave_up_waiting_and_zeroed_is_named(address: str, job_name: str) -> None:
    one, two = start_job(address, W, job=job_name, world_size=2)
    assert error_of(lambda: _norm(one, timeout=0.2))[0] == grpc.StatusCode.DEADLINE_EXCEEDED
    one.call("ZeroGrad")
    code, message = error_of(lambda: _norm(two))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "rank 0 discarded its gradients of step 0 before rank 1 asked" in message


# ---------------------------------------------------------------- opening


def test_a_job_is_compared_by_name_and_the_first_difference_is_told(address: str, job_name: str) -> None:
    parameters = {"a": torch.zeros(2, 3), "b": torch.zeros(4), "c": torch.zeros(5)}
    (client,) = start_job(address, parameters, job=job_name)
    shuffled = {name: parameters[name] for name in ("c", "a", "b")}
    opened = client.open_job(shuffled)
    assert [p.name for p in opened.manifest.parameters] == ["a", "b", "c"]
    assert not opened.needs_weights
    for other, difference in (
        ({**parameters, "b": torch.zeros(5)}, "'b' differs, its shape is (4,) in the job and (5,) in this model"),
        ({**parameters, "c": torch.zeros(5).double()}, "its dtype is float32 in the job and float64"),
        ({**parameters, "d": torch.zeros(1)}, "'d' differs, the job does not have it"),
        ({"a": parameters["a"], "c": parameters["c"]}, "'b' differs, this model does not have it"),
    ):
        code, message = error_of(lambda other=other: client.open_job(other))
        assert code == grpc.StatusCode.FAILED_PRECONDITION
        assert difference in message
    buffers = pb.Manifest(parameters=[spec(n, t, buffer=n == "c") for n, t in parameters.items()])
    assert "its kind" in error_of(lambda: client.call("OpenJob", manifest=buffers))[1]


def test_what_is_frozen_may_thaw_and_what_was_trained_may_have_state_from_then_on(address: str, job_name: str) -> None:
    client = Client(address, job=job_name)
    for trainable, expected in ((False, False), (True, True), (False, True)):
        stated = spec("w", W["w"])
        stated.trainable = trainable
        opened = client.call("OpenJob", manifest=pb.Manifest(parameters=[stated]))
        assert opened.manifest.parameters[0].trainable == expected


def test_nothing_steps_before_every_weight_is_there(address: str, job_name: str) -> None:
    client = Client(address, job=job_name)
    assert client.opened.step == -1
    assert client.open_job({"a": torch.zeros(2), "b": torch.zeros(2)}).needs_weights
    client.set_optimizer()
    client.push_weight(0, torch.zeros(2))
    code, message = error_of(lambda: client.step(0))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "chunk 0 of 'b' is the first" in message
    # A trainer that crashed here left nothing that is worth keeping.
    again = Client(address, job=job_name)
    assert again.opened.step == -1
    assert again.open_job({"other": torch.zeros(2)}).needs_weights


def test_a_job_without_an_optimizer_does_not_step(address: str, job_name: str) -> None:
    client = Client(address, job=job_name)
    client.open_job(W)
    client.push_weight(0, W["w"])
    code, message = error_of(lambda: client.call("Step"))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "no optimizer" in message


def test_another_optimizer_class_is_refused(address: str, job_name: str) -> None:
    (client,) = start_job(address, W, "AdamW", job=job_name)
    client.set_optimizer("AdamW", lr=5.0)
    code, message = error_of(lambda: client.set_optimizer("SGD"))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "torch.optim.AdamW" in message
    assert "SGD" in message


def test_an_unknown_optimizer_is_refused_with_the_allowed_ones(address: str, job_name: str) -> None:
    client = Client(address, job=job_name)
    client.open_job(W)
    code, message = error_of(lambda: client.set_optimizer("Lion"))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "'Lion' cannot run on the servers" in message
    assert "AdamW" in message


def test_the_state_in_memory_outlives_the_trainers(address: str, job_name: str) -> None:
    (first,) = start_job(address, W, "AdamW", job=job_name, lr=0.1)
    (plain,) = [W["w"].clone()]
    reference = torch.optim.AdamW([plain], lr=0.1, fused=True)
    for step, client in enumerate((first, None)):
        if client is None:
            first.close()
            client = Client(address, job=job_name)
            assert client.opened.step == 1
            assert not client.open_job(W).needs_weights
            client.set_optimizer("AdamW", lr=0.1)
        plain.grad = torch.ones(4) + step
        client.push_gradient(0, plain.grad, step=step)
        client.step(step)
        reference.step()
    assert torch.equal(client.pull(0, version=2), plain)


# ---------------------------------------------------------------- failure


def test_a_failed_update_is_reported_until_a_restore(address: str, job_name: str) -> None:
    (client,) = start_job(address, W, "AdamW", job=job_name, lr=0.1)
    client.push_gradient(0, torch.ones(4))
    client.step(0)
    client.pull(0, version=1)
    client.call("Commit", step=1, timeout_seconds=10, metadata='{"a": 1}')
    # amsgrad switched on over state that was begun without it is what torch itself fails on.
    broken = [pb.OptimizerGroup(options=encode_options({"lr": 0.1, "amsgrad": True}))]
    client.step(1, groups=broken)
    for action in (
        lambda: client.pull(0, version=2),
        lambda: client.step(2),
        lambda: client.push_gradient(0, torch.ones(4), step=1),
        lambda: client.call("Commit", step=2, timeout_seconds=5),
    ):
        code, message = error_of(action)
        assert code == grpc.StatusCode.INTERNAL
        assert "step 1 failed on shard 0: 'max_exp_avg_sq'" in message
        assert "restore" in message
    assert client.call("Restore", step=1).metadata == '{"a": 1}'
    client.set_optimizer("AdamW", lr=0.1)
    client.push_gradient(0, torch.ones(4), step=1)
    client.step(1)
    client.pull(0, version=2)


def test_a_server_answers_while_it_updates(address: str, job_name: str) -> None:
    """Chunks become available one by one, not when the whole step is done."""
    parameters = {f"p{i}": torch.zeros(2_000_000) for i in range(20)}
    (client,) = start_job(address, parameters, "NAdam", job=job_name, lr=1.0)
    for number in range(20):
        client.push_gradient(number, torch.ones(2_000_000))
    began = time.monotonic()
    client.step(0)
    stepped = time.monotonic() - began
    client.pull(0, version=1)
    first = time.monotonic() - began
    client.pull(19, version=1)
    last = time.monotonic() - began
    assert stepped < last / 2
    assert first < last / 2
