"""Gradients that are not finite: loss scaling, and steps that are not made."""

from typing import Any

import pytest
import torch
from torch import nn

import trainer
from ps import LocalCluster
from tests.models import Residual, batch, loss_of, seeded
from tests.trainer.runs import gathered_values
from tests.trainer.semantics.groups import run_group

STEPS = 6
FP16 = trainer.OffloadConfig(param_dtype=torch.float16)


def scaler() -> torch.amp.GradScaler:
    # fp16 overflows at the first scale, and grows back to it.
    return torch.amp.GradScaler(
        "cpu", init_scale=2.0**24, backoff_factor=2.0**-8, growth_factor=2.0**8, growth_interval=2
    )


def scaled_loop(model: nn.Module, optimizer: Any, clip: Any, params: Any, before: Any, after: Any) -> list[float]:
    """Unscales explicitly every second time; everything that it shows."""
    scale, shown = scaler(), []
    for step in range(STEPS):
        before()
        loss = loss_of(model, batch(step)).float()
        scale.scale(loss).backward()
        after()
        if step % 2:
            scale.unscale_(optimizer)
            shown.append(clip(params, 0.5).item())
        scale.step(optimizer)
        scale.update()
        optimizer.zero_grad()
        shown += [loss.item(), scale.get_scale()]
    return shown


def plain_scaled() -> tuple[list[float], dict[str, torch.Tensor]]:
    """fp16 copies of fp32 masters, and gradients of the copies, in plain torch."""
    compute = seeded(Residual).half()
    masters = {name: param.detach().clone().requires_grad_() for name, param in seeded(Residual).named_parameters()}
    pairs = [(param, masters[name]) for name, param in compute.named_parameters()]

    @torch.no_grad()
    def before() -> None:
        for param, master in pairs:
            param.copy_(master)
            param.grad = None

    @torch.no_grad()
    def after() -> None:
        for param, master in pairs:
            master.grad = None if param.grad is None else param.grad.float()

    optimizer = torch.optim.AdamW(masters.values(), lr=1e-2, foreach=True)
    shown = scaled_loop(compute, optimizer, torch.nn.utils.clip_grad_norm_, masters.values(), before, after)
    return shown, {name: master.detach() for name, master in masters.items()}


def test_a_grad_scaler_does_what_it_does_in_plain_torch(cluster: LocalCluster, job_name: str) -> None:
    expected, masters = plain_scaled()
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(seeded(Residual), job, FP16)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2, foreach=True)
        shown = scaled_loop(
            model, optimizer, trainer.clip_grad_norm_, list(model.parameters()), lambda: None, lambda: None
        )
        assert shown == pytest.approx(expected, nan_ok=True, rel=0)
        assert job.step + optimizer.skipped_steps == STEPS
        assert 1 < job.step < STEPS
        for name, value in gathered_values(model).items():
            assert torch.equal(value, masters[name].half()), name


def test_every_trainer_skips_where_one_has_a_gradient_that_is_not_finite(cluster: LocalCluster, job_name: str) -> None:
    models = [seeded(Residual) for _ in range(2)]

    def train(job: trainer.Job) -> tuple[list[int], list[int], dict[str, torch.Tensor]]:
        model = trainer.offload(models[job.rank], job)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1, skip_nonfinite=True)
        steps, skipped = [], []
        for number in range(4):
            loss = loss_of(model, batch(number))
            # At the second rank alone, in one iteration alone.
            (loss * (float("nan") if number == 1 and job.rank == 1 else 1.0)).backward()
            if number == 2:
                # The norm tells what the step would ask for.
                trainer.clip_grad_norm_(model.parameters(), 1e9)
            optimizer.step()
            optimizer.zero_grad()
            steps.append(job.step)
            skipped.append(optimizer.skipped_steps)
        return steps, skipped, gathered_values(model)

    one, two = run_group(cluster.addresses, job_name, 2, train)
    assert one[:2] == two[:2] == ([1, 1, 2, 3], [0, 1, 1, 1])
    plain = seeded(Residual)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, fused=True)
    for number in (0, 2, 3):
        loss_of(plain, batch(number)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, param in plain.named_parameters():
        assert torch.equal(one[2][name], two[2][name]), name
        assert torch.equal(one[2][name], param), name


def test_a_scaler_skips_on_every_trainer(cluster: LocalCluster, job_name: str) -> None:
    models = [seeded(Residual) for _ in range(2)]

    def train(job: trainer.Job) -> tuple[list[float], int]:
        model = trainer.offload(models[job.rank], job)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        scale, scales = torch.amp.GradScaler("cpu", init_scale=4.0), []
        for number in range(3):
            factor = float("inf") if number == 1 and job.rank == 0 else 1.0
            scale.scale(loss_of(model, batch(number)) * factor).backward()
            scale.step(optimizer)
            scale.update()
            optimizer.zero_grad()
            scales.append(scale.get_scale())
        assert optimizer.skipped_steps == 1
        return scales, job.step

    assert run_group(cluster.addresses, job_name, 2, train) == [([4.0, 2.0, 2.0], 2)] * 2


def test_clipping_refuses_a_norm_that_is_not_finite_where_it_is_told_to(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(nn.Linear(3, 2), job)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        (model(torch.ones(1, 3)).sum() * float("inf")).backward()
        for norm_type in (2.0, float("inf"), 1):
            with pytest.raises(RuntimeError, match=f"total norm of order {float(norm_type)} .* is non-finite"):
                trainer.clip_grad_norm_(model.parameters(), 1.0, norm_type, error_if_nonfinite=True, foreach=True)
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        norm = trainer.clip_grad_norm_(list(model.parameters()), max_norm=1.0, error_if_nonfinite=True)
        assert norm.shape == () and norm.dtype == torch.float32 and norm.item() == pytest.approx(8**0.5)
        optimizer.step()


def test_a_backward_after_clipping_is_refused_with_what_to_do(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(nn.Linear(3, 2), job)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        model(torch.ones(1, 3)).sum().backward()
        trainer.clip_grad_value_(model.parameters(), 0.5)
        with pytest.raises(trainer.ConfigError, match="after the last backward before step"):
            model(torch.ones(1, 3)).sum().backward()
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
