"""Pulls and gradients of parts of chunks."""

from collections.abc import Iterator, Sequence

import grpc
import pytest
import torch

from protos import zero_ps_pb2 as pb
from ps import LocalCluster
from tests.ps.client import Client, StreamError, start_job, to_bytes

WEIGHT = torch.arange(40_000.0).reshape(200, 200)
"""Of a size that a limited server spills."""


@pytest.fixture(scope="module", params=[None, 2 << 20], ids=["in memory", "limited"])
def address(request: pytest.FixtureRequest) -> Iterator[str]:
    with LocalCluster(1, lease=30, memory=request.param) as cluster:
        yield cluster.addresses[0]


def runs(*bounds: tuple[int, int]) -> pb.Runs:
    return pb.Runs(starts=[start for start, _ in bounds], counts=[stop - start for start, stop in bounds])


def pull(client: Client, bounds: Sequence[tuple[int, int]], **options) -> torch.Tensor:
    request_id = client.send_pull([0], parts=[runs(*bounds)], **options)
    data = client.receive(request_id, 4 * sum(stop - start for start, stop in bounds))
    return torch.frombuffer(bytearray(data), dtype=torch.float32)


def push(client: Client, bounds: Sequence[tuple[int, int]], values: torch.Tensor, **options) -> None:
    client.push(
        pb.PushHeader.KIND_GRADIENT,
        client.chunks(0),
        to_bytes(values),
        dtype=values.dtype,
        parts=[runs(*bounds)],
        **options,
    )


def test_a_pull_of_parts_brings_just_those(address: str, job_name: str) -> None:
    (client,) = start_job(address, {"w": WEIGHT}, job=job_name)
    bounds = [(0, 1), (5, 205), (205, 207), (39_999, 40_000)]
    expected = torch.cat([WEIGHT.view(-1)[start:stop] for start, stop in bounds])
    assert torch.equal(pull(client, bounds), expected)
    assert torch.equal(pull(client, [(0, 40_000)]), WEIGHT.view(-1))
    assert client.pull(0).equal(WEIGHT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_gradients_add_up_with_whole_ones(address: str, job_name: str, dtype: torch.dtype) -> None:
    one, two = start_job(address, {"w": WEIGHT}, "AdamW", job=job_name, world_size=2, lr=0.1)
    plain = WEIGHT.clone()
    reference = torch.optim.AdamW([plain], lr=0.1, fused=True)
    generator = torch.Generator().manual_seed(0)
    for step in range(2):
        total = torch.zeros(40_000)
        for sequence, bounds in enumerate([[(3, 100), (200, 5000)], [(0, 40_000)], [(4000, 39_000)]]):
            for client in (one, two):
                values = torch.randn(sum(b - a for a, b in bounds), generator=generator).to(dtype)
                if client is two and sequence == 2:
                    continue
                push(client, bounds, values, step=step, sequence=sequence)
                for part, (a, b) in zip(values.split([b - a for a, b in bounds]), bounds, strict=True):
                    total[a:b] += part
        for client in (one, two):
            client.step(step)
        plain.grad = (total / 2).view_as(plain)
        reference.step()
        torch.testing.assert_close(one.pull(0, version=step + 1), plain)
        for client in (one, two):
            client.call("ZeroGrad", step=step + 1)


def test_a_repeated_part_counts_once(address: str, job_name: str) -> None:
    (client,) = start_job(address, {"w": WEIGHT}, job=job_name, lr=1.0)
    for _ in range(2):
        push(client, [(10, 20)], torch.ones(10))
    client.step(0)
    expected = WEIGHT.clone()
    expected.view(-1)[10:20] -= 1
    assert torch.equal(client.pull(0, version=1), expected)


@pytest.mark.parametrize(
    "parts",
    [
        [pb.Runs(starts=[0], counts=[40_001])],
        [pb.Runs(starts=[40_000], counts=[1])],
        [pb.Runs(starts=[0, 5], counts=[6, 5])],
        [pb.Runs(starts=[9, 5], counts=[1, 1])],
        [pb.Runs(starts=[5], counts=[0])],
        [pb.Runs(starts=[5], counts=[])],
        [pb.Runs(starts=[2**64 - 1], counts=[2**64 - 1])],
        [pb.Runs(starts=[0], counts=[1])] * 2,
    ],
)
def test_what_is_no_part_of_a_chunk_is_refused(address: str, job_name: str, parts: list[pb.Runs]) -> None:
    (client,) = start_job(address, {"w": WEIGHT}, job=job_name)
    with pytest.raises(StreamError) as error:
        client.receive(client.send_pull([0], parts=parts), 4)
    assert error.value.code == grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(StreamError) as error:
        client.push(pb.PushHeader.KIND_GRADIENT, client.chunks(0), b"1234", parts=parts)
    assert error.value.code == grpc.StatusCode.INVALID_ARGUMENT
