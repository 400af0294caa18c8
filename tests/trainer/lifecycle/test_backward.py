"""Backward by whatever path: several, partial, recomputed, failed, of several models."""

import threading
from typing import Any

import pytest
import torch
from torch import nn

import trainer
from ps import LocalCluster
from tests.models import seeded
from tests.trainer.lifecycle.comparing import AT_ONCE, assert_equal, nothing_gathered, same, step
from tests.trainer.runs import gathered_values


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def test_accumulation_over_micro_batches(cluster: LocalCluster, job_name: str) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(3):
            for _ in range(4):
                model(torch.randn(2, 5)).square().mean().backward()
            step(optimizer)

    same(cluster.addresses, job_name, Mlp, run)


def test_retain_graph(cluster: LocalCluster, job_name: str) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(2):
            loss = model(torch.randn(2, 5)).square().mean()
            loss.backward(retain_graph=True)
            loss.backward()
            step(optimizer)

    same(cluster.addresses, job_name, Mlp, run)


def test_a_graph_that_is_kept_does_not_keep_parameters(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(Mlp(), job, AT_ONCE)
        loss = model(torch.randn(2, 5)).sum()
        nothing_gathered(model)
        loss.backward(retain_graph=True)
        nothing_gathered(model)
        loss.backward()
        nothing_gathered(model)


def test_two_losses_and_two_forwards_before_one_backward(cluster: LocalCluster, job_name: str) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(2):
            first, second = model(torch.randn(2, 5)), model(torch.randn(3, 5))
            first.square().mean().backward()
            second.abs().mean().backward()
            step(optimizer)
            (model(torch.randn(2, 5)).sum() * model(torch.randn(2, 5)).mean()).backward()
            step(optimizer)

    same(cluster.addresses, job_name, Mlp, run)


def test_backward_of_something_that_is_not_a_scalar(cluster: LocalCluster, job_name: str) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        out = model(torch.randn(2, 5))
        out.backward(torch.randn(2, 3))
        step(optimizer)

    same(cluster.addresses, job_name, Mlp, run)


def test_autograd_grad_with_respect_to_inputs_and_parameters(cluster: LocalCluster, job_name: str) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        x = torch.randn(2, 5, requires_grad=True)
        by_input = torch.autograd.grad(model(x).square().sum(), x)
        by_parameters = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        # As a gradient penalty does.
        (inner,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        inner.square().sum().backward()
        step(optimizer)
        return by_input, by_parameters, x.grad

    same(cluster.addresses, job_name, Mlp, run)


def test_one_loss_over_two_offloaded_models(cluster: LocalCluster, job_name: str) -> None:
    def run(models: list[nn.Module], optimizers: list[torch.optim.Optimizer]) -> list[float]:
        torch.manual_seed(3)
        losses = []
        for _ in range(3):
            x = torch.randn(2, 5)
            loss = (models[0](x) * models[1](x)).sum()
            loss.backward()
            for optimizer in optimizers:
                step(optimizer)
            losses.append(loss.item())
        return losses

    plain = [seeded(Mlp, seed) for seed in range(2)]
    expected = run(plain, [torch.optim.SGD(m.parameters(), lr=0.1, fused=True) for m in plain])
    with (
        trainer.connect(cluster.addresses, job=f"{job_name}-a") as a,
        trainer.connect(cluster.addresses, job=f"{job_name}-b") as b,
    ):
        models = [trainer.offload(seeded(Mlp, seed), job) for seed, job in enumerate((a, b))]
        assert (
            run(models, [trainer.RemoteOptimizer(m.parameters(), torch.optim.SGD, lr=0.1) for m in models]) == expected
        )
        for model, other in zip(models, plain, strict=True):
            assert_equal(gathered_values(model), dict(other.named_parameters()))


def test_threads_run_two_offloaded_models_at_once(cluster: LocalCluster, job_name: str) -> None:
    results: dict[int, Any] = {}

    def work(number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        with trainer.connect(cluster.addresses, job=f"{job_name}-{number}") as job:
            model = trainer.offload(models[number], job, trainer.OffloadConfig(param_persistence_threshold=0))
            optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
            for _ in range(20):
                model(torch.randn(2, 5, generator=generator)).square().mean().backward()
                step(optimizer)
            nothing_gathered(model)
            results[number] = gathered_values(model)

    models = [seeded(Mlp, number) for number in range(2)]
    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        plain, generator = seeded(Mlp, number), torch.Generator().manual_seed(number)
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, fused=True)
        for _ in range(20):
            plain(torch.randn(2, 5, generator=generator)).square().mean().backward()
            step(optimizer)
        assert_equal(results[number], dict(plain.named_parameters()))


class Tokens(nn.Module):
    """First layer on integers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.linear = nn.Linear(5, 5)
        self.unused = nn.Linear(5, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.linear(self.embedding(tokens))


def test_inputs_and_outputs_that_need_no_gradient(cluster: LocalCluster, job_name: str) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(2):
            tokens = torch.randint(7, (2, 4))
            # An output that needs none beside one that does; and parameters that are never used.
            (model(tokens).sum() + model(tokens).detach().sum()).backward()
            step(optimizer)

    same(cluster.addresses, job_name, Tokens, run)


class Side(nn.Module):
    """An auxiliary loss that leaves by an attribute instead of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(5, 5))
        self.linear = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        routed = x @ self.gate
        self.auxiliary = (routed * self.gate.sum(0)).square().mean()
        return self.linear(routed)


def test_a_loss_that_leaves_by_an_attribute(cluster: LocalCluster, job_name: str) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for which in range(4):
            out = model(torch.randn(2, 5))
            loss = [out.sum(), model.auxiliary, out.sum() + model.auxiliary, model.auxiliary * out.mean()][which]
            loss.backward()
            step(optimizer)

    same(cluster.addresses, job_name, Side, run)


class Detached(nn.Module):
    """Uses a weight with and without its gradient, after which nothing in the graph leads to it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.scale = nn.Parameter(torch.randn(5))
        self.last = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) * self.scale.detach() + self.last(x) * self.scale


def test_a_weight_that_is_used_detached_too(cluster: LocalCluster, job_name: str) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(3):
            model(torch.randn(2, 5)).square().sum().backward()
            step(optimizer)

    same(cluster.addresses, job_name, Detached, run)


class KeepsParameter(torch.autograd.Function):
    """Keeps a parameter as an attribute, past everything that autograd knows of."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight
        ctx.save_for_backward(x)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (x,) = ctx.saved_tensors
        return grad * ctx.weight, (grad * x).sum(0)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.scale = nn.Parameter(torch.randn(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return KeepsParameter.apply(self.linear(x), self.scale)


def test_an_autograd_function_that_keeps_a_parameter_to_itself(cluster: LocalCluster, job_name: str) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(3):
            model(torch.randn(2, 5)).square().sum().backward()
            step(optimizer)

    same(cluster.addresses, job_name, Custom, run)


def test_a_saved_tensor_that_was_changed_in_place_is_an_error_as_in_torch(cluster: LocalCluster, job_name: str) -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.linear(x).exp()
            out.mul_(2)
            return out

    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(InPlace(), job)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            model(torch.randn(2, 5)).sum().backward()


def test_a_step_between_forward_and_backward_is_an_error_that_names_the_parameter(
    cluster: LocalCluster, job_name: str
) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(Mlp(), job)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        model(torch.randn(2, 5)).sum().backward()
        loss = model(torch.randn(2, 5)).sum()
        step(optimizer)
        with pytest.raises(RuntimeError, match=r"'layers\.\d\.weight' is needed.*at step 0, but the job is at step 1"):
            loss.backward()
