"""What is asked for ahead of time, and in which order."""

import random
from typing import Any

import pytest
import torch
from torch import nn

import trainer
from ps import LocalCluster
from tests.models import Residual, batch, loss_of, seeded
from tests.trainer.coordinator.observing import SlowLinks
from tests.trainer.lifecycle.comparing import same, step
from tests.trainer.runs import Deep
from trainer import requests
from trainer.offload import find

NOTHING_STAYS = trainer.OffloadConfig(param_persistence_threshold=0, max_reuse_distance=0)


class Counter:
    """The share of gathers that were hits since it was made or asked last."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._report = trainer.report(model)

    def share(self) -> float:
        before, self._report = self._report, trainer.report(self._model)
        assert self._report.gathers > before.gathers
        return (self._report.hits - before.hits) / (self._report.gathers - before.gathers)


class Ways(nn.Module):
    """Goes one of two ways through its layers, which are registered in another order than they are used in."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(20)])
        self.way = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        middle = range(12, 4, -1) if self.way == 0 else (3, 14, 4, 13)
        for index in (19, 18, 17, *middle, 0, 2, 1):
            x = torch.tanh(self.layers[index](x))
        return x


def test_the_first_iteration_asks_ahead_in_the_order_of_the_modules(cluster: LocalCluster, job_name: str) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(torch.randn(2, 16)).sum().backward()
        if find(model) is not None:
            report = trainer.report(model)
            assert report.hits >= report.gathers - 2
            assert report.surprises == 0
        step(optimizer)

    same(cluster.addresses, job_name, lambda: Deep(12, 16), run, config=NOTHING_STAYS)


@pytest.mark.parametrize("distance", [0, 1_000_000_000])
def test_of_two_alternating_ways_nearly_all_is_asked_ahead(cluster: LocalCluster, job_name: str, distance: int) -> None:
    def run(model: Any, optimizer: torch.optim.Optimizer) -> None:
        counter = None
        for number in range(14):
            model.way = number % 2
            if number == 2 and find(model) is not None:
                counter = Counter(model)
            model(torch.randn(2, 16)).square().sum().backward()
            step(optimizer)
        assert counter is None or counter.share() >= 0.9

    config = trainer.OffloadConfig(param_persistence_threshold=0, max_reuse_distance=distance)
    model = same(cluster.addresses, job_name, Ways, run, config=config)
    assert trainer.report(model).repaired_traces <= 2


def test_ways_taken_by_chance_cost_little(cluster: LocalCluster, job_name: str) -> None:
    generator = random.Random(0)
    ways = [generator.randrange(2) for _ in range(20)]

    def run(model: Any, optimizer: torch.optim.Optimizer) -> None:
        counter = None
        for number, way in enumerate([0, 1, *ways]):
            model.way = way
            if number == 2 and find(model) is not None:
                counter = Counter(model)
            model(torch.randn(2, 16)).square().sum().backward()
            step(optimizer)
        assert counter is None or counter.share() >= 0.85

    same(cluster.addresses, job_name, Ways, run, config=NOTHING_STAYS)


@pytest.mark.parametrize("ways", [1, 2])
def test_inputs_of_ever_new_shapes_do_not_stop_it(cluster: LocalCluster, job_name: str, ways: int) -> None:
    """As sentences have, each of its own length; of two ways, both were seen with other lengths."""

    def run(model: Any, optimizer: torch.optim.Optimizer) -> None:
        counter = None
        for number in range(12):
            if number == 1 + ways and find(model) is not None:
                counter = Counter(model)
            model.way = number % ways
            model(torch.randn(1 + number, 16)).square().sum().backward()
            step(optimizer)
        assert counter is None or counter.share() >= 0.9

    same(cluster.addresses, job_name, Ways, run, config=NOTHING_STAYS)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.blocks = nn.ModuleList([Deep(4, 16) for _ in range(5)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_()
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=self.reentrant)
        return x


class InnerGradient(nn.Module):
    """Differentiates within its forward, as what computes forces from energies."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = Deep(6, 16)
        self.rest = Deep(8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_()
        force = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]
        return self.rest(force)


@pytest.mark.parametrize(
    "make",
    [lambda: Checkpointed(False), lambda: Checkpointed(True), InnerGradient],
    ids=["checkpoint", "reentrant checkpoint", "gradient in forward"],
)
def test_passes_within_passes_are_asked_ahead(cluster: LocalCluster, job_name: str, make: Any) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        counter = None
        for number in range(6):
            if number == 2 and find(model) is not None:
                counter = Counter(model)
            model(torch.randn(2, 16)).square().sum().backward()
            step(optimizer)
        assert counter is None or counter.share() >= 0.9

    same(cluster.addresses, job_name, make, run, config=NOTHING_STAYS)


class InOrder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16, bias=False) for _ in range(8)])

    def forward(self, x: torch.Tensor, order: list[int]) -> torch.Tensor:
        for index in order:
            x = self.layers[index](x)
        return x


@pytest.mark.parametrize("sent", [False, True], ids=["nobody asked", "asked ahead"])
def test_what_a_module_waits_for_goes_before_what_is_ahead(
    cluster: LocalCluster, job_name: str, monkeypatch: pytest.MonkeyPatch, sent: bool
) -> None:
    monkeypatch.setattr(requests, "WINDOW_BYTES", 1)
    # As many as asked ahead are in the queue before, with the last one or without.
    limit = (8 if sent else 6) * 16 * 16 * 4
    config = trainer.OffloadConfig(param_persistence_threshold=0, prefetch_bucket_size=1, max_live_bytes=limit)
    x = torch.randn(2, 16)
    with trainer.connect(cluster.addresses, job=job_name, timeout=20) as job, torch.no_grad():
        model = trainer.offload(seeded(InOrder), job, config)
        with SlowLinks(model) as links:
            model(x, list(range(8)))
            assert links.asked == [[f"layers.{index}.weight"] for index in range(8)], "in the order of use"
            links.asked.clear()
            links.hold(after=1)
            model.layers[7].register_forward_pre_hook(lambda *_: links.let_go(0.3), prepend=True)
            model(x, [0, 7, 1, 2, 3, 4, 5, 6])
            # The first one ahead had left when the last one was needed.
            assert links.asked[:3] == [["layers.0.weight"], ["layers.1.weight"], ["layers.7.weight"]]


def test_tokens_and_small_parameters_that_stay(cluster: LocalCluster, job_name: str) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        losses = []
        for number in range(4):
            loss = loss_of(model, batch(number))
            loss.backward()
            step(optimizer)
            losses.append(loss.item())
        return losses

    model = same(cluster.addresses, job_name, Residual, run, config=trainer.OffloadConfig())
    report = trainer.report(model)
    assert report.gathers == report.misses == 0, "all of it is persistent"
