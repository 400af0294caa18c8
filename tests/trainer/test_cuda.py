"""On a CUDA device: bytes land there, or in pinned memory and are copied on a stream of their own."""

from collections.abc import Iterator

import pytest
import torch

import trainer
from ps import LocalCluster
from tests.gpu import deterministic, host, needs_gpu, start_servers
from tests.models import Residual, batch, loss_of, seeded
from tests.trainer.runs import gathered_values

pytestmark = [pytest.mark.gpu, needs_gpu]

LINKS = ("shm", "nccl", "grpc")


@pytest.fixture(scope="module")
def servers() -> Iterator[LocalCluster]:
    """Two that have the GPU, too."""
    with host("zero-ps trainer"), start_servers(2) as cluster:
        yield cluster


LARGEST = 96 * 24 * 4


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize(
    "config",
    [
        trainer.OffloadConfig(),
        trainer.OffloadConfig(param_persistence_threshold=0, prefetch_bucket_size=0, max_reuse_distance=0),
        trainer.OffloadConfig(param_persistence_threshold=0, max_live_bytes=8 * LARGEST),
        trainer.OffloadConfig(param_persistence_threshold=0, prefetch_bucket_size=1),
    ],
    ids=["default", "at once", "budget", "small buckets"],
)
def test_training_equals_plain_torch(
    servers: LocalCluster, job_name: str, config: trainer.OffloadConfig, link: str
) -> None:
    with deterministic():
        plain = seeded(Residual).cuda()
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
        expected = [_step(plain, optimizer, number) for number in range(4)]
        with trainer.connect(servers.addresses, job=job_name, links=[link]) as job:
            assert (job.device is not None) == (link == "nccl")
            model = trainer.offload(seeded(Residual), job, config, device="cuda")
            remote = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
            losses = [_step(model, remote, number) for number in range(4)]
            report = trainer.report(model)
            assert config.max_live_bytes is None or report.peak_live_bytes <= config.max_live_bytes
            values = gathered_values(model)
    # The update runs on a CPU there and on the device here, with the same operations in the same order.
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    for name, param in plain.named_parameters():
        torch.testing.assert_close(values[name].cpu(), param.detach().cpu(), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("link", LINKS)
def test_parameters_are_the_servers_also_when_the_device_is_behind(
    servers: LocalCluster, job_name: str, link: str
) -> None:
    """The host runs ahead of a busy device; memory that it reuses may not be overwritten before it was read."""
    layers = torch.nn.Sequential(*[torch.nn.Linear(512, 512, bias=False) for _ in range(8)])
    plain = seeded(lambda: layers)
    values = [layer.weight.detach().clone() for layer in plain]
    x = torch.randn(64, 512, device="cuda")
    with trainer.connect(servers.addresses, job=job_name, links=[link]) as job:
        limit = 2 * 2 * 512 * 512 * 4
        config = trainer.OffloadConfig(param_persistence_threshold=0, max_live_bytes=limit)
        model = trainer.offload(plain, job, config, device="cuda")
        expected = x
        for value in values:
            expected = expected @ value.cuda().t()
        with torch.no_grad():
            for _ in range(5):
                torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]
                torch.testing.assert_close(model(x), expected)


def test_all_links_give_the_same_bits(servers: LocalCluster, job_name: str) -> None:
    """Of parameters and gradients that are large enough to leave from the device, and of some that are not."""

    def new() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(600, 3000), torch.nn.GELU(), torch.nn.Linear(3000, 600))

    values = {}
    with deterministic():
        for link in LINKS:
            config = trainer.OffloadConfig(param_persistence_threshold=0, max_reuse_distance=0)
            with trainer.connect(servers.addresses, job=f"{job_name}-{link}", links=[link]) as job:
                model = trainer.offload(seeded(new), job, config, device="cuda")
                optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
                for step in range(4):
                    generator = torch.Generator().manual_seed(step)
                    # The device is behind when gradients are sent.
                    torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]
                    model(torch.randn(4, 600, generator=generator).cuda()).square().mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                values[link] = {name: value.cpu() for name, value in gathered_values(model).items()}
    for link in LINKS:
        for name, value in values["shm"].items():
            assert torch.equal(values[link][name], value), (link, name)


def test_a_server_that_is_killed_is_an_error_and_no_hang(job_name: str) -> None:
    with host("zero-ps trainer"), start_servers(1) as cluster:
        job = trainer.connect(cluster.addresses, job=job_name, links=["nccl"], timeout=30)
        model = trainer.offload(torch.nn.Linear(2000, 2000), job, device="cuda")
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        x = torch.ones(1, 2000, device="cuda")
        model(x).sum().backward()
        cluster.kill(0)
        with pytest.raises(trainer.ConnectError):
            for _ in range(3):
                optimizer.step()
                optimizer.zero_grad()
                model(x).sum().backward()
        job.close()
        torch.cuda.synchronize()


def _step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, number: int) -> float:
    loss = loss_of(model, batch(number).cuda())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()
