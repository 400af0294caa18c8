"""Training with servers against training in one process."""

import pytest
import torch

import trainer
from ps import LocalCluster
from tests.models import Residual, batch, loss_of, seeded, train
from tests.ranks import run_ranks
from tests.trainer.runs import gathered_values

LARGE = {"vocabulary": 3001, "width": 700, "layers": 1}
"""Sizes that cut parameters into several chunks, at rows whose length is no power of two."""


def plain_adamw(make, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = seeded(make)
    losses = train(model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True), range(steps))
    return losses, {name: param.detach() for name, param in model.named_parameters()}


@pytest.mark.parametrize("servers", [1, 2, 3])
def test_ten_steps_of_adamw_equal_plain_torch_bit_for_bit(servers: int) -> None:
    expected_losses, expected = plain_adamw(lambda: Residual(**LARGE), 10)
    with LocalCluster(servers=servers) as cluster, trainer.connect(cluster.addresses) as job:
        with job.init():
            model = seeded(lambda: Residual(**LARGE))
        trainer.offload(model, job)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)
        losses = train(model, optimizer, range(10))
        actual = gathered_values(model)
    assert losses == expected_losses
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_a_model_built_without_init_trains_the_same(cluster: LocalCluster, job_name: str) -> None:
    expected_losses, expected = plain_adamw(Residual, 5)
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(seeded(Residual), job)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)
        assert train(model, optimizer, range(5)) == expected_losses
        for name, value in gathered_values(model).items():
            assert torch.equal(value, expected[name]), name


def test_two_trainers_equal_one_with_the_whole_batch_and_each_other_from_run_to_run(
    cluster: LocalCluster, job_name: str
) -> None:
    runs = [
        run_ranks("trainer.runs:steps_of_adamw", cluster.addresses, 2, job=f"{job_name}-{run}", steps=5)
        for run in range(2)
    ]
    for ranks in runs:
        for name, value in ranks[0]["params"].items():
            assert torch.equal(value, ranks[1]["params"][name]), name
    for name, value in runs[0][0]["params"].items():
        assert torch.equal(value, runs[1][0]["params"][name]), name
    _, expected = plain_adamw(Residual, 5)
    for name, value in runs[0][0]["params"].items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_everything_but_what_persists_is_released_between_steps(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(seeded(Residual), job, trainer.OffloadConfig(param_persistence_threshold=100))
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        for step in range(2):
            loss_of(model, batch(step)).backward()
            assert whole(model) <= 100
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            model(batch(0))
        assert whole(model) <= 100


def whole(model: torch.nn.Module) -> int:
    """Elements of the largest parameter whose memory is here."""
    return max((p.numel() for p in model.parameters() if p.untyped_storage().nbytes()), default=0)


def test_learning_rates_of_a_scheduler_reach_the_servers(cluster: LocalCluster, job_name: str) -> None:
    def run(model, optimizer) -> None:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
        for step in range(6):
            loss_of(model, batch(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()

    plain = seeded(Residual)
    run(plain, torch.optim.SGD(plain.parameters(), lr=0.5, momentum=0.9, fused=True))
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(seeded(Residual), job)
        run(model, trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.5, momentum=0.9))
        actual = gathered_values(model)
    for name, param in plain.named_parameters():
        assert torch.equal(actual[name], param), name


def test_gradients_of_micro_batches_add_up_as_in_torch(cluster: LocalCluster, job_name: str) -> None:
    def run(model, optimizer) -> None:
        for step in range(3):
            for micro in range(3):
                loss_of(model, batch(10 * step + micro)).backward()
            optimizer.step()
            optimizer.zero_grad()

    plain = seeded(Residual)
    run(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True))
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(seeded(Residual), job)
        run(model, trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2))
        actual = gathered_values(model)
    for name, param in plain.named_parameters():
        assert torch.equal(actual[name], param), name


def test_clipping_gives_the_norm_and_the_parameters_of_torch(cluster: LocalCluster, job_name: str) -> None:
    def run(model, optimizer, clip) -> list[float]:
        norms = []
        for step in range(4):
            loss_of(model, batch(step)).backward()
            norms.append(clip(model.parameters(), 0.05).item())
            optimizer.step()
            optimizer.zero_grad()
        return norms

    plain = seeded(Residual)
    expected = run(plain, torch.optim.SGD(plain.parameters(), lr=0.5), torch.nn.utils.clip_grad_norm_)
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(seeded(Residual), job)
        norms = run(
            model, trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.5), trainer.clip_grad_norm_
        )
        actual = gathered_values(model)
    assert norms == pytest.approx(expected, rel=1e-5)
    assert max(norms) > 0.05
    for name, param in plain.named_parameters():
        torch.testing.assert_close(actual[name], param, rtol=1e-5, atol=1e-6, msg=name)


def test_bf16_compute_keeps_fp32_masters(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(seeded(Residual), job, trainer.OffloadConfig(param_dtype=torch.bfloat16))
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.5)
        train(model, optimizer, range(4))
        actual = gathered_values(model)
    # The same scheme in plain torch: bf16 copies of fp32 masters, gradients of the copies.
    masters = {name: param.detach().clone() for name, param in seeded(Residual).named_parameters()}
    compute = seeded(Residual).to(torch.bfloat16)
    for step in range(4):
        with torch.no_grad():
            for name, param in compute.named_parameters():
                param.copy_(masters[name])
        compute.zero_grad()
        loss_of(compute, batch(step)).backward()
        for name, param in compute.named_parameters():
            if param.grad is not None and param.numel():
                masters[name].grad = param.grad.float()
        torch.optim.SGD([m.requires_grad_() for m in masters.values()], lr=0.5, fused=True).step()
    for name, master in masters.items():
        assert torch.equal(actual[name], master.detach().bfloat16()), name
