"""`max_staleness` as servers have it: which versions they answer with, and which gradients they take."""

from collections.abc import Iterator

import grpc
import pytest
import torch

from ps import LocalCluster
from ps.chunk import Chunk
from ps.errors import VersionGone
from ps.monitor import Patience
from ps.newest import newest_blocks
from tests.ps.client import Client, connect_all, error_of, start_job

W = {"w": torch.zeros(4)}


@pytest.fixture(scope="module")
def late() -> Iterator[str]:
    with LocalCluster(1, lease=30, flags=["--late-updates"]) as cluster:
        yield cluster.addresses[0]


def step(client: Client, number: int, gradient: float = 1.0) -> None:
    client.push_gradient(0, torch.full((4,), gradient), step=number)
    client.step(number)
    client.call("ZeroGrad", step=number + 1)


def test_a_trainer_gets_so_far_ahead_and_no_further(late: str, job_name: str) -> None:
    (client,) = start_job(late, W, job=job_name, lr=1.0, max_staleness=2)
    for number in range(5):
        # Always the weights of two steps before, until there is no doing without the next update.
        pulled = client.pull(0, version=number, max_staleness=2)
        assert torch.equal(pulled, torch.full((4,), -float(max(0, number - 2))))
        code, message = error_of(lambda n=number: client.pull(0, version=n + 2, max_staleness=1, timeout=0.2))
        assert code == grpc.StatusCode.DEADLINE_EXCEEDED
        assert f"version {number + 1} of chunk 0 of 'w'" in message
        assert f"max_staleness=1, and the trainer is at step {number + 2}" in message
        step(client, number)
    # Whoever names a version gets that one.
    assert torch.equal(client.pull(0, version=5), torch.full((4,), -5.0))


def test_sums_of_several_steps_are_kept_apart(late: str, job_name: str) -> None:
    """Steps with a gradient and without one, micro-batches, gradients that were dropped before their step."""
    (client,) = start_job(late, W, job=job_name, lr=1.0, max_staleness=3)
    gradients = [(1.0,), (2.0, 0.5), (), (8.0,), (), (), (16.0, 4.0), (32.0,)]
    for number, parts in enumerate(gradients):
        client.push_gradient(0, torch.full((4,), 1000.0), step=number)
        client.call("ZeroGrad", step=number)
        for sequence, part in enumerate(parts):
            client.push_gradient(0, torch.full((4,), part), step=number, sequence=sequence)
        client.step(number)
        client.call("ZeroGrad", step=number + 1)
    total = 0.0
    for parts in gradients:
        total -= sum(parts)
    assert torch.equal(client.pull(0, version=len(gradients)), torch.full((4,), total))


def test_gradients_that_stay_count_again(late: str, job_name: str) -> None:
    (client,) = start_job(late, W, job=job_name, lr=1.0, max_staleness=3)
    client.push_gradient(0, torch.ones(4), step=0)
    client.step(0)
    # Nothing new, and then more of it, for which the updates before have to be made.
    client.step(1)
    client.push_gradient(0, torch.ones(4), step=2)
    client.step(2)
    client.call("ZeroGrad", step=3, keep_zeros=True)
    client.step(3)
    assert torch.equal(client.pull(0, version=4), torch.full((4,), -4.0))


def test_norms_are_those_of_the_present_step(late: str, job_name: str) -> None:
    (client,) = start_job(late, W, job=job_name, lr=1.0, max_staleness=3)
    for number in range(4):
        client.push_gradient(0, torch.full((4,), float(number)), step=number)
        norms = client.call("GradNorm", step=number, norm_type=2.0, timeout_seconds=10).chunk_norms
        assert list(norms) == [2.0 * number]
        client.step(number)
        client.call("ZeroGrad", step=number + 1)


@pytest.mark.parametrize("bounds", [((0, 6),), ((0, 2), (3, 6))], ids=["whole", "parts"])
def test_a_chunk_is_never_of_two_versions(bounds: tuple[tuple[int, int], ...]) -> None:
    """Though it may go on while it is being read."""
    chunk = Chunk(0, 0, "w", (6,), torch.float32, 3)
    chunk.weight.hold(torch.full((6,), 3.0))

    def update() -> None:
        with chunk.lock:
            chunk.weight.tensor.add_(1.0)
            chunk.advance(changed=True)

    read = b""
    for block in newest_blocks(chunk, bounds, 2, 4, torch.float32, Patience.of(5)):
        for start in range(0, block.num_bytes, 4):
            read += block.read(start, start + 4)
            update()
    assert set(torch.frombuffer(bytearray(read), dtype=torch.float32).tolist()) == {3.0}
    (late,) = newest_blocks(chunk, ((0, 6),), 2, 4, torch.float32, Patience.of(5))
    with pytest.raises(VersionGone):
        late.read(0, 4)


def test_a_version_that_is_past_is_gone(late: str, job_name: str) -> None:
    (client,) = start_job(late, W, job=job_name, lr=1.0, max_staleness=1)
    for number in range(3):
        step(client, number)
    client.pull(0, version=3)
    assert "is gone" in error_of(lambda: client.pull(0, version=2, max_staleness=1))[1]
    assert "came at version 3" in error_of(lambda: client.push_gradient(0, torch.ones(4), step=2))[1]


def test_what_makes_no_sense_is_refused(late: str, job_name: str) -> None:
    (client,) = start_job(late, W, job=job_name, lr=1.0)
    assert "0 to 64, not 65" in error_of(lambda: client.set_optimizer(max_staleness=65))[1]
    assert "0 to 64, not 4000000000" in error_of(lambda: client.pull(0, max_staleness=4_000_000_000))[1]


def test_ranks_that_disagree_are_told(late: str, job_name: str) -> None:
    clients = connect_all(late, job=job_name)
    for client in clients:
        client.open_job(W)
    clients[0].set_optimizer(max_staleness=1)
    message = error_of(lambda: clients[1].set_optimizer(max_staleness=3))[1]
    assert "trainers disagree on max_staleness: it is 1 on rank 0 and 3 on rank 1" in message


def test_a_job_that_is_exact_puts_nothing_off(late: str, job_name: str) -> None:
    (client,) = start_job(late, W, job=job_name, lr=1.0)
    for number in range(3):
        step(client, number)
        assert torch.equal(client.pull(0, version=number + 1), torch.full((4,), -float(number + 1)))


def test_a_successor_finds_all_updates_made(late: str, job_name: str) -> None:
    (client,) = start_job(late, W, job=job_name, lr=1.0, max_staleness=5)
    for number in range(4):
        step(client, number)
    client.drop()
    successor = Client(late, job=job_name)
    assert successor.opened.step == 4
    successor.open_job(W)
    assert torch.equal(successor.pull(0, version=4), torch.full((4,), -4.0))
