"""Models built under `Job.init()`."""

from typing import Any

import pytest
import torch
from torch import nn

import trainer
from ps import LocalCluster
from tests.models import seeded
from tests.trainer.lifecycle.comparing import nothing_gathered, same, step, steps
from tests.trainer.runs import gathered_values
from trainer import construction


@pytest.fixture(autouse=True, params=["leaves at once", "fits"])
def resident_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Once with hardly any room, so that every parameter leaves and comes back all the time."""
    if request.param == "leaves at once":
        monkeypatch.setattr(construction, "RESIDENT_BYTES", 64)
    return str(request.param)


class Reinitialising(nn.Module):
    """A parent that initialises its children anew, in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 5) for _ in range(4)])
        self.apply(self._initialise)
        for number, layer in enumerate(self.layers):
            with torch.no_grad():
                layer.weight[number] *= 0.5
                layer.weight.div_(1 + layer.weight.abs().max())
        self.layers[1].weight.data = self.layers[0].weight.data.t().contiguous()
        self.layers[2].weight.data.mul_(2)
        self.layers[3].bias.data.copy_(self.layers[0].bias + self.layers[1].bias)
        nn.init.zeros_(self.layers[2].bias)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.orthogonal_(module.weight)
            nn.init.normal_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Late(nn.Module):
    """Parameters before, between and after submodules."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Parameter(torch.randn(5))
        self.inner = nn.Linear(5, 5)
        self.register_parameter("between", nn.Parameter(torch.empty(5, 5)))
        self.stack = nn.Sequential(*[nn.Linear(5, 5) for _ in range(3)])
        self.after = nn.ParameterList([nn.Parameter(torch.randn(5)) for _ in range(2)])
        self.named = nn.ParameterDict({"a": nn.Parameter(torch.randn(()))})
        self.register_parameter("none", None)
        nn.init.xavier_uniform_(self.between)
        nn.init.normal_(self.before)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stack(self.inner(x + self.before) @ self.between)
        return x * self.after[0] + self.after[1] * self.named["a"]


def dynamic() -> nn.Module:
    """Classes that are made in a function, one inside the other."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight

    class Outer(Inner):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()
            # Replaced at once: the first one never counts.
            self.weight = nn.Parameter(torch.randn(5, 5) / 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(super().forward(x))

    return nn.Sequential(Outer(), type("Renamed", (Outer,), {})())


class Custom(nn.Parameter):
    """A parameter class of somebody's own."""

    note = "kept"


class WithCustom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = Custom(torch.randn(5, 5))
        self.weight.tag = "mine"
        self.linear = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert type(self.weight) is Custom
        return self.linear(x @ self.weight)


@pytest.mark.parametrize("make", [Reinitialising, Late, dynamic, WithCustom])
def test_models_built_under_init_are_those_built_without(cluster: LocalCluster, job_name: str, make: Any) -> None:
    model = same(cluster.addresses, job_name, make, steps(4, 5, count=2), init=True)
    if make is WithCustom:
        assert model.weight.tag == "mine" and model.weight.note == "kept" and isinstance(model.weight, Custom)


def test_parameters_leave_while_the_model_is_built(cluster: LocalCluster, job_name: str, resident_bytes: str) -> None:
    if resident_bytes == "fits":
        pytest.skip("nothing has to leave")
    with trainer.connect(cluster.addresses, job=job_name) as job:
        with job.init():
            stack = [nn.Linear(20, 20) for _ in range(5)]
            whole = [p.untyped_storage().nbytes() > 0 for layer in stack for p in layer.parameters()]
            assert whole == [False] * 8 + [True] * 2
            model = nn.Sequential(*stack)
        nothing_gathered(model)


def test_other_ranks_and_later_runs_do_not_send_their_values(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        with job.init():
            model = seeded(Reinitialising, seed=1)
        trainer.offload(model, job)
        expected = gathered_values(model)
        assert job.stats.bytes_pushed > 0
    with trainer.connect(cluster.addresses, job=job_name) as job:
        with job.init():
            model = seeded(Reinitialising, seed=2)
        trainer.offload(model, job)
        assert job.stats.bytes_pushed == 0
        for name, value in gathered_values(model).items():
            assert torch.equal(value, expected[name]), name


def test_a_job_that_has_state_needs_no_values_at_all(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        trainer.offload(seeded(Late), job)
    with trainer.connect(cluster.addresses, job=job_name) as job:
        with torch.device("meta"), job.init():
            model = Late()
        trainer.offload(model, job)
        for (name, value), (_, expected) in zip(
            gathered_values(model).items(), seeded(Late).named_parameters(), strict=True
        ):
            assert value.device.type == "cpu"
            assert torch.equal(value, expected), name


def test_an_exception_in_a_constructor_leaves_torch_as_it_was(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        with pytest.raises(ZeroDivisionError), job.init():
            nn.Linear(5, 5)
            raise ZeroDivisionError
        layer = nn.Linear(5, 5)
        assert type(layer.weight) is nn.Parameter
        with job.init():
            model = seeded(Late)
        trainer.offload(model, job)
        for (name, value), (_, expected) in zip(
            gathered_values(model).items(), seeded(Late).named_parameters(), strict=True
        ):
            assert torch.equal(value, expected), name


def test_dtypes_of_many_kinds(cluster: LocalCluster, job_name: str) -> None:
    class Kinds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Parameter(torch.randn(5, 5, dtype=torch.float64))
            self.short = nn.Parameter(torch.randn(5).to(torch.bfloat16))
            self.table = nn.Parameter(torch.arange(5), requires_grad=False)
            self.mask = nn.Parameter(torch.ones(5, dtype=torch.bool), requires_grad=False)
            self.frozen = nn.Parameter(torch.randn(5).to(torch.float16), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = (x.double() @ self.wide).float() * self.short.float() + self.frozen.float()
            return x[:, self.table] * self.mask

    with trainer.connect(cluster.addresses, job=job_name) as job:
        with job.init():
            model = seeded(Kinds)
        trainer.offload(model, job)
        for (name, value), (_, expected) in zip(
            gathered_values(model).items(), seeded(Kinds).named_parameters(), strict=True
        ):
            assert value.dtype == expected.dtype
            assert torch.equal(value, expected), name
        optimizer = trainer.RemoteOptimizer([p for p in model.parameters() if p.requires_grad], torch.optim.SGD, lr=0.1)
        plain = seeded(Kinds)
        reference = torch.optim.SGD([plain.wide], lr=0.1)
        torch.manual_seed(1)
        x = torch.randn(4, 5)
        for network, opt in ((model, optimizer), (plain, reference)):
            network(x).sum().backward()
            step(opt)
        assert torch.equal(gathered_values(model)["wide"], plain.wide)
