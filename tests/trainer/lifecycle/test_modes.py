"""Modes, frozen and toggled parameters, unused ones, compiled submodules."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import trainer
from ps import LocalCluster
from tests.models import seeded
from tests.ranks import run_ranks
from tests.trainer.lifecycle.comparing import assert_equal, nothing_gathered, same, step, steps
from tests.trainer.runs import gathered_values


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.drop(self.norm(F.relu(self.first(x)))))


def test_modes_may_be_switched_at_any_point(cluster: LocalCluster, job_name: str) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        outputs = []
        for number in range(6):
            x = torch.randn(4, 5)
            model.train(number % 3 != 2)
            with torch.no_grad():
                outputs.append(model(x))
            loss = model(x).square().mean()
            # An evaluation between forward and backward.
            model.eval()
            with torch.inference_mode():
                outputs.append(model(x).clone())
            loss.backward()
            model.train()
            step(optimizer)
            with torch.enable_grad():
                outputs.append(model(x).detach())
        return [o.clone() for o in outputs], dict(model.named_buffers())

    same(cluster.addresses, job_name, Net, run)


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 9)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.mix(self.embedding(tokens).cumsum(1))))


def test_generation_loops_with_growing_length(cluster: LocalCluster, job_name: str) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        results = []
        for mode in (torch.no_grad, torch.inference_mode):
            tokens = torch.zeros(2, 1, dtype=torch.long)
            with mode():
                for _ in range(6):
                    tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
            results.append(tokens.tolist())
            F.cross_entropy(model(torch.tensor([[1, 2, 3]]))[0], torch.tensor([2, 3, 4])).backward()
            step(optimizer)
        return results

    same(cluster.addresses, job_name, Generator, run)


def test_requires_grad_may_change_between_steps(cluster: LocalCluster, job_name: str) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for number in range(6):
            model.first.requires_grad_(number % 2 == 0)
            model.last.weight.requires_grad = number != 3
            model(torch.randn(4, 5)).square().mean().backward()
            step(optimizer)

    same(cluster.addresses, job_name, Net, run)


class Adapted(nn.Module):
    """A frozen base with a low-rank adapter on it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(5, 5)
        self.base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(5, 2))
        self.up = nn.Parameter(torch.zeros(2, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.down @ self.up


def test_adapters_on_a_frozen_base(cluster: LocalCluster, job_name: str) -> None:
    same(cluster.addresses, job_name, lambda: nn.Sequential(Adapted(), Adapted()), steps(4, 5, count=4))


def test_frozen_parameters_cause_no_gradient_traffic_and_no_state(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(frozen(), job)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=0.1)
        before = job.stats.bytes_pushed
        model(torch.randn(2, 40)).sum().backward()
        step(optimizer)
        assert job.stats.bytes_pushed - before == 40 * 4


def frozen() -> nn.Module:
    model = nn.Linear(40, 40)
    model.weight.requires_grad_(False)
    return model


def test_a_group_may_be_all_frozen_and_a_backward_may_reach_nothing(cluster: LocalCluster, job_name: str) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for number in range(3):
            model.requires_grad_(number != 1)
            x = torch.randn(4, 5, requires_grad=True)
            model(x).square().mean().backward()
            step(optimizer)

    same(cluster.addresses, job_name, Net, run)


def test_optimizer_steps_skip_what_got_no_gradient(cluster: LocalCluster, job_name: str) -> None:
    """AdamW's weight decay and moments would move it otherwise."""

    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for number in range(5):
            out = model.first(torch.randn(4, 5))
            if number % 2:
                out = model.last(out)
            out.square().mean().backward()
            step(optimizer)

    same(cluster.addresses, job_name, Net, run)


def test_ranks_may_run_different_modules(cluster: LocalCluster, job_name: str) -> None:
    ranks = run_ranks("trainer.lifecycle.on_ranks:different_modules", cluster.addresses, 2, job=job_name, steps=6)
    assert ranks[0]["chosen"] != ranks[1]["chosen"]
    assert_equal(ranks[0]["params"], ranks[1]["params"])
    from tests.trainer.lifecycle.on_ranks import different_modules_in_one_process

    for name, value in different_modules_in_one_process(2, 6).items():
        assert torch.equal(ranks[0]["params"][name], value), name


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_compiled_submodule_below_the_hooks(cluster: LocalCluster, job_name: str, how: str) -> None:
    def make() -> nn.Module:
        model = nn.Sequential(
            nn.Linear(5, 5), nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)), nn.Linear(5, 2)
        )
        if how == "wrapped":
            model[1] = torch.compile(model[1], backend="aot_eager")
        else:
            model[1].compile(backend="aot_eager")
        return model

    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        losses = []
        for _ in range(3):
            loss = model(torch.randn(4, 5)).square().mean()
            loss.backward()
            step(optimizer)
            with torch.no_grad():
                losses.append((loss.item(), model(torch.ones(1, 5)).sum().item()))
        return losses

    same(cluster.addresses, job_name, make, run)


@pytest.mark.parametrize("kind", ["parametrize", "weight_norm", "spectral_norm", "old weight_norm"])
def test_parametrizations(cluster: LocalCluster, job_name: str, kind: str) -> None:
    class Symmetric(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.triu() + x.triu(1).transpose(-1, -2)

    def make() -> nn.Module:
        linear = nn.Linear(5, 5)
        match kind:
            case "parametrize":
                nn.utils.parametrize.register_parametrization(linear, "weight", Symmetric())
            case "weight_norm":
                nn.utils.parametrizations.weight_norm(linear)
            case "old weight_norm":
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    nn.utils.weight_norm(linear)
            case "spectral_norm":
                nn.utils.parametrizations.spectral_norm(linear)
        return nn.Sequential(linear, nn.Tanh(), nn.Linear(5, 2))

    same(cluster.addresses, job_name, make, steps(4, 5))


def test_recurrent_and_convolutional_layers(cluster: LocalCluster, job_name: str) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(3, 4, 3, padding=1)
            self.lstm = nn.LSTM(4, 5, num_layers=2, batch_first=True, bidirectional=True)
            self.attention = nn.MultiheadAttention(10, 2, batch_first=True)
            self.head = nn.Linear(10, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x).transpose(1, 2)
            x, _ = self.lstm(x)
            return self.head(self.attention(x, x, x)[0])

    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        losses = []
        for _ in range(3):
            loss = model(torch.randn(2, 3, 7)).square().mean()
            loss.backward()
            step(optimizer)
            losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            losses.append(model(torch.ones(1, 3, 4)).sum().item())
        return losses

    same(cluster.addresses, job_name, Mixed, run)


def test_remove_leaves_a_whole_plain_module_that_trains_on(cluster: LocalCluster, job_name: str) -> None:
    plain = seeded(Net)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, fused=True)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> list[float]:
        torch.manual_seed(seed)
        losses = []
        for _ in range(2):
            loss = model(torch.randn(4, 5)).square().mean()
            loss.backward()
            step(optimizer)
            losses.append(loss.item())
        return losses

    expected = [train(plain, optimizer, seed) for seed in range(3)]
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(seeded(Net), job, trainer.OffloadConfig(param_persistence_threshold=0))
        actual = [train(model, trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1), 0)]
        assert trainer.remove(model) is model
        assert {type(p) for p in model.parameters()} == {nn.Parameter}
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
        import copy

        copy.deepcopy(model)
        kept = copy.deepcopy(model.state_dict())
        actual.append(train(model, torch.optim.SGD(model.parameters(), lr=0.1, fused=True), 1))
        assert_equal(actual, expected[:2])
        # The job stayed where it was; offloaded again, the model is that of the job.
        trainer.offload(model, job, trainer.OffloadConfig(param_persistence_threshold=0))
        assert_equal(gathered_values(model), {n: kept[n] for n, _ in model.named_parameters()})
        train(model, trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1), 1)
        nothing_gathered(model)


def test_a_submodule_that_is_attached_later_trains_as_a_local_one(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(nn.Sequential(nn.Linear(5, 5)), job)
        model.append(nn.Linear(5, 2))
        # One that shares what is offloaded finds it.
        shared = nn.Linear(5, 5)
        shared.weight = model[0].weight
        model.insert(1, shared)
        optimizer = trainer.RemoteOptimizer(model[0].parameters(), torch.optim.SGD, lr=0.1)
        model(torch.randn(3, 5)).sum().backward()
        assert model[2].weight.grad.abs().sum() > 0 and model[2].weight.untyped_storage().nbytes()
        step(optimizer)
        with pytest.raises(trainer.ConfigError, match=r"shape \(5,\) is not offloaded"):
            trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)


def test_a_parameter_that_was_replaced_is_an_error(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(nn.Sequential(nn.Linear(5, 5)), job)
        model[0].weight = nn.Parameter(torch.zeros(5, 5))
        with pytest.raises(trainer.ZeroPsError, match=r"'0\.weight' was replaced or added after trainer\.offload"):
            model(torch.randn(3, 5))
