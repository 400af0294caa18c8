"""Runs the same code on a plain model and on an offloaded one, and compares every bit."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import trainer
from tests.models import seeded
from tests.trainer.runs import gathered_values

AT_ONCE = trainer.OffloadConfig(param_persistence_threshold=0, prefetch_bucket_size=0, max_reuse_distance=0)
"""Parameters come when they are needed and go when they are not."""

Run = Callable[[nn.Module, torch.optim.Optimizer], Any]


def nothing_gathered(model: nn.Module, *, but: int = 0) -> None:
    """Asserts that no parameter of more than `but` elements has memory."""
    whole = {name: p.numel() for name, p in model.named_parameters() if p.untyped_storage().nbytes()}
    assert all(numel <= but for numel in whole.values()), f"still gathered: {whole}"


def same(
    addresses: list[str],
    job_name: str,
    make: Callable[[], nn.Module],
    run: Run,
    *,
    config: trainer.OffloadConfig | None = None,
    init: bool = False,
    remote: type[torch.optim.Optimizer] = torch.optim.AdamW,
) -> nn.Module:
    """Asserts that `run` returns the same tensors and leaves the same parameters on both models.

    `run` takes a model and its optimizer, does whatever it tests and returns tensors, numbers or
    containers of them. By default nothing persists, so that every parameter goes through its whole life.
    Returns the offloaded model (its job is closed).
    """
    plain = seeded(make)
    optimizer = remote([p for p in plain.parameters() if p.requires_grad], lr=1e-2, fused=True)
    torch.manual_seed(7)
    expected = run(plain, optimizer)
    with trainer.connect(addresses, job=job_name) as job:
        if init:
            with job.init():
                model = seeded(make)
        else:
            model = seeded(make)
        config = config or trainer.OffloadConfig(param_persistence_threshold=0)
        trainer.offload(model, job, config)
        optimizer = trainer.RemoteOptimizer([p for p in model.parameters() if p.requires_grad], remote, lr=1e-2)
        torch.manual_seed(7)
        actual = run(model, optimizer)
        assert_equal(actual, expected)
        # What a forward left for a backward that may come, and did not.
        trainer.release(model)
        nothing_gathered(model)
        values = gathered_values(model)
        for name, param in plain.named_parameters():
            assert torch.equal(values[name], param), name
    return model


def assert_equal(actual: Any, expected: Any) -> None:
    """Equal structure, and tensors equal bit for bit."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected), (actual, expected)
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for left, right in zip(actual, expected, strict=True):
            assert_equal(left, right)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_equal(actual[key], expected[key])
    else:
        assert actual == expected


def step(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad()


def steps(*shape: int, count: int = 3) -> Run:
    """A run of some steps on random inputs of a shape; the losses."""

    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        losses = []
        for _ in range(count):
            loss = model(torch.randn(*shape)).square().mean()
            loss.backward()
            step(optimizer)
            losses.append(loss.item())
        return losses

    return run
