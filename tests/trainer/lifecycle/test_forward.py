"""Whatever a forward takes, gives and does with parameters."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import trainer
from ps import LocalCluster
from tests.trainer.lifecycle.comparing import AT_ONCE, nothing_gathered, same, step, steps

Pair = namedtuple("Pair", ["left", "right"])


class TypedPair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor | None


@dataclass
class Output:
    value: torch.Tensor
    extra: Any = None


class ModelOutput(OrderedDict):
    """As Hugging Face's: an ordered dict whose items are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


WRAPS = {
    "tensor": (lambda x: x, lambda out: out),
    "tuple": (lambda x: (x, None, 3), lambda out: out[0]),
    "list": (lambda x: [x, "text"], lambda out: out[0]),
    "dict": (lambda x: {"a": {"b": x}, "n": None}, lambda out: out["a"]["b"]),
    "namedtuple": (lambda x: Pair(x, 1), lambda out: out.left),
    "NamedTuple": (lambda x: TypedPair(x, None), lambda out: out.left),
    "dataclass": (Output, lambda out: out.value),
    "ModelOutput": (lambda x: ModelOutput(logits=x), lambda out: out.logits),
    "nested": (lambda x: [Output(({"x": x},)), None], lambda out: out[0].value[0]["x"]),
    "object": (lambda x: SimpleNamespace(hidden=x), lambda out: out.hidden),
}


class Wrapping(nn.Module):
    """Takes and gives a container."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.wrap, self.unwrap = WRAPS[kind]

    def forward(self, inputs: Any = None, *, scale: float = 1.0) -> Any:
        return self.wrap(torch.tanh(self.linear(self.unwrap(inputs))) * scale)


class Chain(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Wrapping(kind) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value = self.parts[0].wrap(x)
        for part in self.parts:
            value = part(inputs=value, scale=1.5)
        return self.parts[0].unwrap(value)


@pytest.mark.parametrize("kind", WRAPS)
def test_inputs_and_outputs_in_containers_and_keywords_only(cluster: LocalCluster, job_name: str, kind: str) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        outputs = []
        for _ in range(2):
            out = model(torch.randn(3, 5))
            out.square().sum().backward()
            step(optimizer)
            outputs.append(out.detach())
        return outputs

    same(cluster.addresses, job_name, lambda: Chain(kind), run)


def trains(make: Any, cluster: LocalCluster, job_name: str, **options: Any) -> nn.Module:
    """Three steps of a model on (4, 5) inputs."""
    return same(cluster.addresses, job_name, make, steps(4, 5), **options)


class Albert(nn.Module):
    """One layer, several times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = torch.tanh(self.layer(x))
            self.calls += 1
        return x


class Recursive(nn.Module):
    """Calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5) / 5)

    def forward(self, x: torch.Tensor, depth: int = 3) -> torch.Tensor:
        if depth == 0:
            return x @ self.weight
        return torch.tanh(self(x, depth - 1) @ self.weight)


class TwoParents(nn.Module):
    """One module inside two others."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(5, 5)
        self.left = nn.Sequential(shared, nn.Tanh(), nn.Linear(5, 5))
        self.right = nn.Sequential(nn.Linear(5, 5), shared)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.left(x) + self.right(x)


@pytest.mark.parametrize("make", [Albert, Recursive, TwoParents])
def test_a_module_that_runs_several_times_before_backward(cluster: LocalCluster, job_name: str, make: Any) -> None:
    trains(make, cluster, job_name)


class Reader(nn.Module):
    """Uses a parameter of another module, in one of several ways."""

    def __init__(self, owner: nn.Linear, how: str) -> None:
        super().__init__()
        self.how = how
        self.listed = [owner.weight]
        self.elsewhere = [owner]
        if how == "tied":
            self.weight = owner.weight

    def forward(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        match self.how:
            case "attribute":
                weight = self.elsewhere[0].weight
            case "list":
                weight = self.listed[0]
            case "tied":
                weight = self.weight
        return F.linear(x, weight.t())


class External(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.owner = nn.Linear(5, 5)
        self.reader = Reader(self.owner, how)
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.owner(x))
        return self.reader(x, self.owner.weight) if self.how == "argument" else self.reader(x)


@pytest.mark.parametrize("how", ["attribute", "argument", "list", "tied"])
def test_external_parameters_are_found(cluster: LocalCluster, job_name: str, how: str) -> None:
    model = trains(lambda: External(how), cluster, job_name)
    assert "owner.weight" in dict(model.named_parameters())


def test_an_external_parameter_is_fetched_before_the_forward_from_the_second_time_on(
    cluster: LocalCluster, job_name: str
) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = External("attribute")
        trainer.offload(model, job, AT_ONCE)
        found = []

        def look(module: nn.Module, args: object) -> None:
            found.append(model.owner.weight.untyped_storage().nbytes() > 0)

        # After the hooks of the package, so it sees what they did.
        model.reader.register_forward_pre_hook(look)
        for _ in range(2):
            model(torch.randn(4, 5)).sum().backward()
        assert found == [False, True]
        nothing_gathered(model)


class TiedHead(nn.Module):
    """`lm_head` = embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 5)
        self.body = nn.Linear(5, 5)
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(self.embedding(tokens))))


@pytest.mark.parametrize("init", [False, True])
def test_tied_weights_are_one_parameter(cluster: LocalCluster, job_name: str, init: bool) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        losses = []
        for _ in range(3):
            tokens = torch.randint(11, (4, 6))
            loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
            loss.backward()
            step(optimizer)
            losses.append(loss.item())
        return losses

    model = same(cluster.addresses, job_name, TiedHead, run, init=init)
    assert model.head.weight is model.embedding.weight
    assert [name for name, _ in model.named_parameters()] == ["embedding.weight", "body.weight", "body.bias"]


class Handing(nn.Module):
    """Returns its bias, or a view of it, to be added later (as Megatron's linear layers do)."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5) / 3)
        self.bias = nn.Parameter(torch.randn(10))
        self.how = how

    def forward(self, x: torch.Tensor) -> Any:
        out = x @ self.weight
        match self.how:
            case "parameter":
                return out, self.bias
            case "view":
                return out, {"bias": self.bias[:5]}
            case "detached":
                return out, self.bias.detach()
        self.kept = self.bias.view(2, 5)
        return out, None


class Dangling(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.handing = Handing(how)
        self.last = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, bias = self.handing(x)
        out = self.last(out)
        if isinstance(bias, dict):
            return out * bias["bias"]
        if bias is None:
            kept, self.handing.kept = self.handing.kept, None
            return out * kept[1]
        return out * bias[:5]


@pytest.mark.parametrize("how", ["parameter", "view", "detached", "attribute"])
def test_dangling_parameters_and_views_stay_alive(cluster: LocalCluster, job_name: str, how: str) -> None:
    trains(lambda: Dangling(how), cluster, job_name)


class Experts(nn.Module):
    """Routes each batch to one of several experts, by its content."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(5, 5) for _ in range(4)])
        self.head = nn.Linear(5, 5)
        self.chosen: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        choice = int(x.sum().abs().item() * 7) % 4
        self.chosen.append(choice)
        return self.head(self.experts[choice](x))


def test_routing_that_changes_between_steps(cluster: LocalCluster, job_name: str) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        for _ in range(8):
            model(torch.randn(4, 5)).square().mean().backward()
            step(optimizer)
        return model.chosen

    model = same(cluster.addresses, job_name, Experts, run)
    assert len(set(model.chosen)) > 1


@pytest.mark.parametrize(
    "config",
    [
        {"leaf_modules": (Experts,)},
        {"leaf_modules": ("experts.0", "experts.3")},
        {"leaf_modules": ("",)},
        {"module_granularity_threshold": 30},
        {"module_granularity_threshold": 10_000},
    ],
)
def test_leaf_modules_are_gathered_as_one(cluster: LocalCluster, job_name: str, config: dict) -> None:
    trains(Experts, cluster, job_name, config=trainer.OffloadConfig(param_persistence_threshold=0, **config))


def test_a_leaf_is_whole_while_any_of_its_parts_runs(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = nn.Sequential(nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)), nn.Linear(5, 5))
        config = replace(AT_ONCE, leaf_modules=("0",))
        trainer.offload(model, job, config)
        seen = []
        model[0][0].register_forward_hook(
            lambda *_: seen.append([p.untyped_storage().nbytes() > 0 for p in model.parameters()])
        )
        model(torch.randn(2, 5))
        assert seen == [[True] * 4 + [False] * 2]


def test_an_unknown_leaf_module_is_refused(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job, pytest.raises(trainer.ConfigError, match="'nowhere'"):
        trainer.offload(Experts(), job, trainer.OffloadConfig(leaf_modules=("nowhere",)))


def test_what_persists_stays_and_is_refreshed_after_every_step(cluster: LocalCluster, job_name: str) -> None:
    config = replace(AT_ONCE, param_persistence_threshold=6)
    trains(Experts, cluster, job_name, config=config)
    with trainer.connect(cluster.addresses, job=f"{job_name}-2") as job:
        model = trainer.offload(Experts(), job, config)
        model(torch.randn(4, 5))
        assert model.head.bias.untyped_storage().nbytes()
        nothing_gathered(model, but=5)
        trainer.release(model)
        nothing_gathered(model)
        model(torch.randn(4, 5))


def test_the_model_persistence_threshold_bounds_what_stays(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        config = replace(AT_ONCE, param_persistence_threshold=6, model_persistence_threshold=11)
        model = trainer.offload(nn.Sequential(*[nn.Linear(5, 5) for _ in range(4)]), job, config)
        model(torch.randn(4, 5))
        assert sum(p.numel() for p in model.parameters() if p.untyped_storage().nbytes()) == 10
