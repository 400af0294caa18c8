"""Bytes in and out: versions are exact, contributions count once, the sum does not depend on arrival."""

import time
from collections.abc import Iterator

import grpc
import pytest
import torch

from protos import MESSAGE_BYTES
from protos import zero_ps_pb2 as pb
from ps import LocalCluster
from tests.ps.client import Client, StreamError, error_of, spec, start_job, to_bytes

W = {"w": torch.arange(12.0).reshape(4, 3)}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with LocalCluster(1, lease=30) as cluster:
        yield cluster.addresses[0]


# ---------------------------------------------------------------- pull


def test_parameters_of_all_shapes_come_back(address: str, job_name: str) -> None:
    torch.manual_seed(0)
    parameters = {
        "scalar": torch.randn(()),
        "empty": torch.empty(0, 4),
        "odd": torch.randn(7, 3, 5),
        "large": torch.randn(1500, 1501),
        "double": torch.randn(5, dtype=torch.float64),
        "half": torch.randn(33, dtype=torch.bfloat16),
        "count": torch.tensor([3, -4]),
        "mask": torch.tensor([True, False, True]),
    }
    (client,) = start_job(address, parameters, job=job_name)
    for number, tensor in enumerate(parameters.values()):
        assert torch.equal(client.pull(number), tensor)
    assert torch.equal(client.pull(3, dtype=torch.bfloat16), parameters["large"].bfloat16())


def test_small_chunks_share_messages(address: str, job_name: str) -> None:
    parameters = {f"p{i}": torch.full((1000,), float(i)) for i in range(100)}
    (client,) = start_job(address, parameters, job=job_name)
    client.send_pull(range(100))
    response = next(client.pulls.call)
    assert response.data == b"".join(map(to_bytes, parameters.values()))


def test_large_answers_are_cut_into_messages(address: str, job_name: str) -> None:
    (client,) = start_job(address, {"a": torch.randn(100), "b": torch.randn(700_000)}, job=job_name)
    request_id = client.send_pull([0, 1])
    sizes = []
    while sum(sizes) < 4 * 700_100:
        response = next(client.pulls.call)
        assert response.request_id == request_id
        sizes.append(len(response.data))
    assert sizes == [400, MESSAGE_BYTES, MESSAGE_BYTES, 4 * 700_000 - 2 * MESSAGE_BYTES]


def test_a_pull_of_nothing_is_answered_with_nothing(address: str, job_name: str) -> None:
    (client,) = start_job(address, W, job=job_name)
    request_id = client.send_pull([], chunks=[])
    response = next(client.pulls.call)
    assert response == pb.PullResponse(request_id=request_id)


def test_a_pull_waits_for_its_version(address: str, job_name: str) -> None:
    (client,) = start_job(address, W, job=job_name, lr=1.0)
    request_id = client.send_pull([0], version=1)
    client.push_gradient(0, torch.ones(4, 3))
    client.step(0)
    expected = W["w"] - 1
    assert client.receive(request_id, 48) == to_bytes(expected)


def test_a_pull_of_an_old_version_says_that_it_is_gone(address: str, job_name: str) -> None:
    (client,) = start_job(address, W, job=job_name)
    client.step(0)
    client.pull(0, version=1)
    code, message = error_of(lambda: client.pull(0, version=0))
    assert code == grpc.StatusCode.OUT_OF_RANGE
    assert "version 0 of chunk 0 of 'w' is gone: it is at version 1" in message
    # The stream goes on.
    assert torch.equal(client.pull(0, version=1), W["w"])


def test_a_pull_gives_up_in_time_and_says_what_it_waited_for(address: str, job_name: str) -> None:
    (client,) = start_job(address, W, job=job_name)
    began = time.monotonic()
    code, message = error_of(lambda: client.pull(0, version=1, timeout=0.3))
    assert time.monotonic() - began < 15
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "waited 0.3 s for version 1 of chunk 0 of 'w'" in message


def test_what_is_ready_is_sent_before_what_is_not(address: str, job_name: str) -> None:
    client = Client(address, job=job_name)
    client.open_job({"a": torch.zeros(3), "b": torch.zeros(3)})
    client.push_weight(0, torch.ones(3))
    client.send_pull([0, 1])
    assert next(client.pulls.call).data == to_bytes(torch.ones(3))
    client.push_weight(1, torch.ones(3))
    assert next(client.pulls.call).data == to_bytes(torch.ones(3))


def test_a_reader_pulls_and_changes_nothing(address: str, job_name: str) -> None:
    (client,) = start_job(address, W, job=job_name)
    reader = Client(address, job=job_name, read_only=True)
    reader.manifest = client.manifest
    assert reader.opened.step == 0
    assert torch.equal(reader.pull(0), W["w"])
    for action in (
        lambda: reader.push_gradient(0, W["w"]),
        lambda: reader.push_weight(0, W["w"]),
        lambda: reader.call("Step"),
        lambda: reader.call("ZeroGrad"),
        lambda: reader.call("Commit", timeout_seconds=1),
        reader.set_optimizer,
        lambda: reader.call("Barrier", tag="t", timeout_seconds=1),
    ):
        assert error_of(action)[0] == grpc.StatusCode.INVALID_ARGUMENT


# ---------------------------------------------------------------- push


def test_a_gradient_counts_once_however_often_it_is_sent(address: str, job_name: str) -> None:
    (client,) = start_job(address, W, job=job_name, lr=1.0)
    one, two = torch.full((4, 3), 1.0), torch.full((4, 3), 2.0)
    client.push_gradient(0, one, sequence=0)
    client.push_gradient(0, one, sequence=0)
    client.push_gradient(0, two, sequence=1)
    client.push_gradient(0, two, sequence=0)
    client.push_gradient(0, two, sequence=1)
    client.step(0)
    client.push_gradient(0, one, step=1, sequence=0)  # Nothing was zeroed: adds up, as in torch.
    client.step(1)
    assert torch.equal(client.pull(0, version=2), W["w"] - 3 - 4)


def test_a_gradient_that_skips_one_is_refused(address: str, job_name: str) -> None:
    (client,) = start_job(address, W, job=job_name)
    code, message = error_of(lambda: client.push_gradient(0, W["w"], sequence=1))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "before gradient 0" in message


def test_half_a_contribution_counts_nothing(address: str, job_name: str) -> None:
    large = {"a": torch.zeros(2_200_000), "b": torch.zeros(3)}
    (client,) = start_job(address, large, job=job_name, lr=1.0)
    header = pb.PushHeader(
        session_id=client.session_id,
        kind=pb.PushHeader.KIND_GRADIENT,
        dtype=pb.DTYPE_FLOAT32,
        chunks=client.chunks(0) + client.chunks(1),
    )
    data = to_bytes(torch.ones(2_200_000))
    client.pushes.requests.put(pb.PushRequest(header=header))
    for start in range(0, len(data), MESSAGE_BYTES):
        client.pushes.requests.put(pb.PushRequest(data=data[start : start + MESSAGE_BYTES]))
    time.sleep(0.5)
    client.pushes.close()
    client.step(0)
    assert torch.equal(client.pull(0, version=1), large["a"])


def test_gradients_of_16_bits_add_up_in_fp32(address: str, job_name: str) -> None:
    (client,) = start_job(address, {"w": torch.zeros(4)}, job=job_name, lr=1.0)
    big, small = torch.full((4,), 256.0).bfloat16(), torch.full((4,), 1.0).half()
    client.push_gradient(0, big, sequence=0)
    client.push_gradient(0, small, sequence=1)
    client.step(0)
    assert torch.equal(client.pull(0, version=1), torch.full((4,), -257.0))


@pytest.mark.parametrize("first", [0, 1, 2])
def test_the_average_does_not_depend_on_who_came_first(address: str, job_name: str, first: int) -> None:
    torch.manual_seed(0)
    gradients = [[torch.randn(1000) for _ in range(2)] for _ in range(3)]
    clients = start_job(address, {"w": torch.zeros(1000)}, world_size=3, job=job_name, lr=1.0)
    for turn in range(3):
        rank = (first + turn) % 3
        for sequence, gradient in enumerate(gradients[rank]):
            clients[rank].push_gradient(0, gradient, sequence=sequence)
    for turn in range(3):
        clients[(first + 2 * turn) % 3].step(0)
    sums = [a + b for a, b in gradients]
    expected = -((sums[0] + sums[1]) + sums[2]) / 3
    assert torch.equal(clients[0].pull(0, version=1), expected)


def test_a_rank_that_contributed_nothing_counts_as_zero(address: str, job_name: str) -> None:
    clients = start_job(address, W, world_size=2, job=job_name, lr=1.0)
    clients[1].push_gradient(0, torch.ones(4, 3))
    for client in clients:
        client.step(0)
    assert torch.equal(clients[0].pull(0, version=1), W["w"] - 0.5)


def test_a_gradient_of_another_step_is_refused(address: str, job_name: str) -> None:
    (client,) = start_job(address, W, job=job_name)
    client.step(0)
    client.pull(0, version=1)
    for step, words in ((0, "step 0 for chunk 0 of 'w' came at version 1"), (2, "while job")):
        code, message = error_of(lambda step=step: client.push_gradient(0, W["w"], step=step))
        assert code == grpc.StatusCode.FAILED_PRECONDITION
        assert words in message


def test_only_rank_0_writes_weights(address: str, job_name: str) -> None:
    clients = start_job(address, W, world_size=2, job=job_name)
    assert error_of(lambda: clients[1].push_weight(0, W["w"]))[0] == grpc.StatusCode.INVALID_ARGUMENT
    clients[0].push_weight(0, W["w"] + 1)
    assert torch.equal(clients[1].pull(0), W["w"] + 1)


def test_a_weight_waits_for_the_update_that_it_follows(address: str, job_name: str) -> None:
    torch.manual_seed(0)
    large = {f"p{i}": torch.randn(500_000) for i in range(8)}
    (client,) = start_job(address, large, "AdamW", job=job_name)
    for number in range(8):
        client.push_gradient(number, torch.randn(500_000))
    client.step(0)
    client.push_weight(7, torch.zeros(500_000), step=1)
    assert torch.equal(client.pull(7, version=1), torch.zeros(500_000))


def test_weights_travel_in_any_floating_dtype(address: str, job_name: str) -> None:
    (client,) = start_job(address, W, job=job_name)
    client.push_weight(0, W["w"].bfloat16() * 2)
    assert torch.equal(client.pull(0), W["w"] * 2)


# ---------------------------------------------------------------- staging


def test_staged_weights_become_the_jobs_own(address: str, job_name: str) -> None:
    client = Client(address, job=job_name)
    weight, frozen = torch.randn(5, 4), torch.randn(3).bfloat16()
    for staging_id, tensor in ((7, weight), (8, frozen)):
        client.push(
            pb.PushHeader.KIND_STAGED,
            [pb.ChunkRef(parameter=staging_id, chunk=0)],
            to_bytes(tensor),
            dtype=tensor.dtype,
            chunk_bytes=[tensor.nbytes],
        )
    request_id = client.send_pull([], chunks=[pb.ChunkRef(parameter=7, chunk=0)], staged=True)
    assert client.receive(request_id, weight.nbytes) == to_bytes(weight)
    specs = [spec("late", torch.zeros(2)), spec("weight", weight), spec("frozen", frozen)]
    specs[1].staging_id, specs[2].staging_id = 7, 8
    opened = client.call("OpenJob", manifest=pb.Manifest(parameters=specs))
    client.manifest = opened.manifest
    assert opened.needs_weights
    assert list(opened.bound) == [pb.ChunkRef(parameter=1), pb.ChunkRef(parameter=2)]
    assert torch.equal(client.pull(1), weight)
    assert torch.equal(client.pull(2), frozen)
    client.push_weight(0, torch.ones(2))
    client.set_optimizer()
    client.step(0)


def test_staged_weights_of_another_size_are_refused(address: str, job_name: str) -> None:
    client = Client(address, job=job_name)
    client.push(pb.PushHeader.KIND_STAGED, [pb.ChunkRef(parameter=1)], to_bytes(torch.zeros(3)), chunk_bytes=[12])
    stated = spec("w", torch.zeros(4))
    stated.staging_id = 1
    code, message = error_of(lambda: client.call("OpenJob", manifest=pb.Manifest(parameters=[stated])))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "'w' has 4 elements, and 3 were staged" in message


# ---------------------------------------------------------------- streams


def test_an_error_passes_over_its_data_and_the_stream_goes_on(address: str, job_name: str) -> None:
    (client,) = start_job(address, {"w": torch.zeros(500_000)}, job=job_name, lr=1.0)
    with pytest.raises(StreamError, match="no chunk 9"):
        client.push(pb.PushHeader.KIND_GRADIENT, [pb.ChunkRef(parameter=0, chunk=9)], bytes(3 * MESSAGE_BYTES))
    client.push_gradient(0, torch.ones(500_000))
    client.step(0)
    assert torch.equal(client.pull(0, version=1), torch.full((500_000,), -1.0))


def test_data_that_nobody_announced_ends_the_stream(address: str, job_name: str) -> None:
    (client,) = start_job(address, W, job=job_name)
    client.pushes.requests.put(pb.PushRequest(data=b"1234"))
    assert error_of(lambda: next(client.pushes.call))[0] == grpc.StatusCode.INVALID_ARGUMENT


def test_more_data_than_announced_is_an_error(address: str, job_name: str) -> None:
    (client,) = start_job(address, W, job=job_name)
    action = lambda: client.push(pb.PushHeader.KIND_GRADIENT, client.chunks(0), bytes(52))  # noqa: E731
    assert error_of(action)[0] == grpc.StatusCode.INVALID_ARGUMENT


def test_less_data_than_announced_is_an_error_once_the_next_push_comes(address: str, job_name: str) -> None:
    (client,) = start_job(address, W, job=job_name)
    header = pb.PushHeader(
        session_id=client.session_id,
        request_id=1,
        kind=pb.PushHeader.KIND_GRADIENT,
        dtype=pb.DTYPE_FLOAT32,
        chunks=client.chunks(0),
    )
    client.pushes.requests.put(pb.PushRequest(header=header))
    client.pushes.requests.put(pb.PushRequest(data=bytes(40)))
    header.request_id = 2
    client.pushes.requests.put(pb.PushRequest(header=header))
    client.pushes.requests.put(pb.PushRequest(data=bytes(48)))
    responses = [next(client.pushes.call) for _ in range(2)]
    assert [r.request_id for r in responses] == [1, 2]
    assert "still lacked 8 bytes" in responses[0].error.message
    assert not responses[1].HasField("error")
