"""On a CUDA device: bytes land in pinned memory and are copied on a stream of their own."""

import pytest
import torch

import trainer
from ps import LocalCluster
from tests.models import Residual, batch, loss_of, seeded
from tests.trainer.runs import gathered_values

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here"),
]

LARGEST = 96 * 24 * 4


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
def test_training_equals_plain_torch(cluster: LocalCluster, job_name: str, config: trainer.OffloadConfig) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        plain = seeded(Residual).cuda()
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
        expected = [_step(plain, optimizer, number) for number in range(4)]
        with trainer.connect(cluster.addresses, job=job_name) as job:
            model = trainer.offload(seeded(Residual), job, config, device="cuda")
            remote = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
            losses = [_step(model, remote, number) for number in range(4)]
            report = trainer.report(model)
            assert config.max_live_bytes is None or report.peak_live_bytes <= config.max_live_bytes
            values = gathered_values(model)
    finally:
        torch.use_deterministic_algorithms(False)
    # The update runs on a CPU there and on the device here, with the same operations in the same order.
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    for name, param in plain.named_parameters():
        torch.testing.assert_close(values[name].cpu(), param.detach().cpu(), rtol=1e-5, atol=1e-6, msg=name)


def test_parameters_are_the_servers_also_when_the_device_is_behind(cluster: LocalCluster, job_name: str) -> None:
    """The host runs ahead of a busy device; memory that it reuses may not be overwritten before it was read."""
    layers = torch.nn.Sequential(*[torch.nn.Linear(512, 512, bias=False) for _ in range(8)])
    plain = seeded(lambda: layers)
    values = [layer.weight.detach().clone() for layer in plain]
    x = torch.randn(64, 512, device="cuda")
    with trainer.connect(cluster.addresses, job=job_name) as job:
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


def _step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, number: int) -> float:
    loss = loss_of(model, batch(number).cuda())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()
