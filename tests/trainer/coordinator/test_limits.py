"""Memory limits: kept at every instant, and what can never fit is said at once."""

import time
from typing import Any

import pytest
import torch
from torch import nn

import trainer
from ps import LocalCluster
from tests.models import seeded
from tests.trainer.coordinator.observing import Observer, SlowLinks
from tests.trainer.lifecycle.comparing import nothing_gathered, same, step, steps
from tests.trainer.runs import Deep
from trainer import requests
from trainer.offload import find

KIB = 1 << 10


class Parent(nn.Module):
    """Uses a parameter of its own before and after its child."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.ones(width, width))
        self.child = nn.Linear(width, width, bias=False)
        self.other = nn.Linear(width, width // 4, bias=False)

    def forward(self, x: torch.Tensor, *, child: bool = True) -> torch.Tensor:
        return self.child(x @ self.own) @ self.own if child else self.other(x)


def test_a_model_trains_in_a_tenth_of_its_size(cluster: LocalCluster, job_name: str) -> None:
    """The limit is twice the largest submodule, and the model is 20 times that size."""
    layers, width = 40, 64
    limit = 2 * width * width * 4
    config = trainer.OffloadConfig(max_live_bytes=limit)

    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        if find(model) is None:
            return steps(4, width)(model, optimizer)
        with Observer(model) as observer:
            losses = steps(4, width)(model, optimizer)
            report = trainer.report(model)
            assert limit / 2 < observer.peak_bytes <= report.peak_live_bytes <= limit
            # There is room for one ahead.
            assert report.hits >= 0.8 * report.gathers
            nothing_gathered(model)
        return losses

    model = same(cluster.addresses, job_name, lambda: Deep(layers, width), run, config=config)
    assert sum(p.numel() * 4 for p in model.parameters()) == 20 * limit


@pytest.mark.parametrize("limit", [{"max_live_bytes": 16 * KIB - 1}, {"max_live_parameters": 64 * 64 - 1}])
def test_a_module_that_exceeds_a_limit_is_refused_at_once(
    cluster: LocalCluster, job_name: str, limit: dict[str, int]
) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = nn.Sequential(nn.Linear(4, 64), nn.Sequential(nn.Linear(64, 64, bias=False)))
        with pytest.raises(trainer.OutOfBudget) as raised:
            trainer.offload(model, job, trainer.OffloadConfig(**limit))
        text = str(raised.value)
        assert "'1.0'" in text
        for size in ("16384 bytes", "16383 bytes") if "max_live_bytes" in limit else ("4096", "4095"):
            assert size in text
        # Nothing has changed: the limit can be raised.
        config = trainer.OffloadConfig(**{name: value + 1 for name, value in limit.items()})
        assert trainer.offload(model, job, config)(torch.randn(2, 4)).shape == (2, 64)


class Listed(nn.Module):
    """Has its parameters in a list, and uses one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(64, 64) / 8 for _ in range(6)])
        self.steps = nn.ModuleList([Using(self.weights, index) for index in range(6)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for one in self.steps:
            x = torch.tanh(one(x))
        return x


class Using(nn.Module):
    def __init__(self, weights: nn.ParameterList, index: int) -> None:
        super().__init__()
        self.found = [weights, index]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, index = self.found
        return x @ weights[index]


def test_a_list_of_parameters_need_not_fit_at_once(cluster: LocalCluster, job_name: str) -> None:
    same(
        cluster.addresses,
        job_name,
        Listed,
        steps(3, 64),
        config=trainer.OffloadConfig(param_persistence_threshold=0, max_live_bytes=2 * 16 * KIB),
    )


@pytest.mark.parametrize("what", ["bytes", "elements"])
@pytest.mark.parametrize("ahead", [0, 4_000_000])
def test_what_does_not_fit_together_is_refused_at_once_and_training_goes_on(
    cluster: LocalCluster, job_name: str, what: str, ahead: int
) -> None:
    limits: dict[str, int] = {"max_live_bytes": 24 * KIB} if what == "bytes" else {"max_live_parameters": 6 * KIB}
    config = trainer.OffloadConfig(param_persistence_threshold=0, prefetch_bucket_size=ahead, **limits)
    plain = seeded(Parent)
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(seeded(Parent), job, config)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        reference = torch.optim.SGD(plain.parameters(), lr=0.1)
        x = torch.randn(3, 64)
        with Observer(model):
            for _ in range(3):
                began = time.monotonic()
                with pytest.raises(trainer.OutOfBudget) as raised:
                    model(x)
                assert time.monotonic() - began < 10
                for word in ("'child'", "in use", "max_live_bytes" if what == "bytes" else "max_live_parameters"):
                    assert word in str(raised.value)
                with pytest.raises(trainer.OutOfBudget, match=r"trainer\.gathered"), trainer.gathered(model):
                    raise AssertionError("unreachable")
                nothing_gathered(model)
                for each, its in ((model, optimizer), (plain, reference)):
                    loss = each(x, child=False).square().sum()
                    loss.backward()
                    step(its)
                nothing_gathered(model)
            with trainer.gathered(model.other.weight):
                assert torch.equal(model.other.weight, plain.other.weight)


def test_of_two_models_the_first_is_not_kept_when_the_second_does_not_fit(cluster: LocalCluster, job_name: str) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))

    with (
        trainer.connect(cluster.addresses, job=job_name) as first_job,
        trainer.connect(cluster.addresses, job=f"{job_name}-2") as second_job,
    ):
        first = trainer.offload(make(), first_job, trainer.OffloadConfig(param_persistence_threshold=0))
        limited = trainer.OffloadConfig(param_persistence_threshold=0, max_live_bytes=16 * KIB)
        second = trainer.offload(make(), second_job, limited)
        with (
            pytest.raises(trainer.OutOfBudget, match=r"trainer\.gathered"),
            trainer.gathered([*first.parameters(), *second.parameters()]),
        ):
            raise AssertionError("unreachable")
        for model in (first, second):
            model(torch.randn(2, 64)).sum().backward()
            nothing_gathered(model)


class Skipping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Linear(2, 32, bias=False)
        self.skipped = nn.Linear(32, 128, bias=False)
        self.last = nn.Linear(32, 128)

    def forward(self, x: torch.Tensor, *, skip: bool) -> torch.Tensor:
        x = self.small(x)
        if not skip:
            self.skipped(x)
        return self.last(x)


def test_half_of_a_module_that_was_asked_ahead_and_has_not_left_is_not_lost(
    cluster: LocalCluster, job_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for a weight ahead and not for its bias; making room takes back what has not left."""
    monkeypatch.setattr(requests, "WINDOW_BYTES", 1)
    limit = 2 * 32 * 128 * 4 + 2 * 32 * 4
    config = trainer.OffloadConfig(param_persistence_threshold=0, max_live_bytes=limit, prefetch_bucket_size=1)
    plain = seeded(Skipping)
    x = torch.randn(3, 2)
    with trainer.connect(cluster.addresses, job=job_name, timeout=20) as job, torch.no_grad():
        model = trainer.offload(seeded(Skipping), job, config)
        assert torch.equal(model(x, skip=False), plain(x, skip=False))
        with SlowLinks(model) as links, Observer(model):
            links.hold(after=1)
            # Before its parameters are gathered.
            model.last.register_forward_pre_hook(lambda *_: links.let_go(0.2), prepend=True)
            assert torch.equal(model(x, skip=True), plain(x, skip=True))
            assert links.asked[1:] == [["skipped.weight"], ["last.weight"], ["last.bias"]]


def _watched(run: Any) -> Any:
    def watched(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        if find(model) is None:
            return run(model, optimizer)
        with Observer(model):
            return run(model, optimizer)

    return watched
