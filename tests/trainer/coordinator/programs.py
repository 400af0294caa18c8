"""Random models: module graphs with branches, loops, ties, experts, checkpoints, and ways to train them."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.models import seeded

WIDTH = 6
LEAVES = 6


@dataclass(frozen=True)
class Spec:
    """A module to be: its kind, a number that means something to that kind, and what is in it."""

    kind: str
    number: int = 0
    parts: tuple["Spec", ...] = field(default=())


class Leaf(nn.Module):
    """Layers of different sizes, one of them frozen, one with parameters of its own around a child's run."""

    def __init__(self, number: int) -> None:
        super().__init__()
        hidden = 3 + 5 * number
        self.up = nn.Linear(WIDTH, hidden, bias=number % 2 == 0)
        self.down = nn.Linear(hidden, WIDTH, bias=number % 3 == 0)
        if number == 1:
            self.up.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(WIDTH)) if number == 2 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.scale is not None:
            x = x * self.scale
        x = x + 0.1 * self.down(torch.tanh(self.up(x)))
        return x if self.scale is None else x * self.scale


class Node(nn.Module):
    """What a spec says. `leaves` are shared by all nodes, so that weights are tied."""

    def __init__(self, spec: Spec, leaves: list[Leaf], switch: list[int]) -> None:
        super().__init__()
        self.spec = spec
        # Not only registered where it is first used: several nodes may hold the same leaf.
        self.leaf = leaves[spec.number % LEAVES] if spec.kind in ("leaf", "borrow") else None
        if spec.kind == "borrow":
            # Not a child: its weight is an external parameter.
            self.leaf, self.lender = None, [leaves[spec.number % LEAVES]]
        self.experts = nn.ModuleList(leaves if spec.kind == "experts" else [])
        self.own = nn.Parameter(torch.randn(WIDTH)) if spec.kind == "own" else None
        self.parts = nn.ModuleList([Node(part, leaves, switch) for part in spec.parts])
        # Which way to go in this step; a list, so that it is shared.
        self.switch = switch

    def _all(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = part(x)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kind, number, way = self.spec.kind, self.spec.number, self.switch[0]
        if kind == "leaf":
            assert self.leaf is not None
            return self.leaf(x)
        if kind == "borrow":
            return x + 0.1 * F.linear(torch.tanh(F.linear(x, self.lender[0].up.weight)), self.lender[0].down.weight)
        if kind == "experts":
            chosen = random.Random(way * 31 + number).sample(range(LEAVES), 2)
            return x + sum(self.experts[index](x) for index in chosen)
        if kind == "branch":
            return self.parts[(way + number) % len(self.parts)](x)
        if kind == "loop":
            for _ in range(1 + (way + number) % 3):
                x = self._all(x)
            return x
        if kind == "checkpoint":
            return checkpoint(self._all, x, use_reentrant=number % 2 == 0)
        if kind == "no_grad":
            with torch.no_grad():
                change = self._all(x)
            return x + change
        if kind == "detach":
            return x + self._all(x.detach())
        if kind == "own":
            return self._all(x * self.own) + self.own
        return self._all(x)


class Program(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.switch = [0]
        leaves = [Leaf(number) for number in range(LEAVES)]
        self.root = Node(spec, leaves, self.switch)
        # So that there always is something to train.
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Reentrant checkpoints ask for an input that wants a gradient.
        return self.head(self.root(x.requires_grad_()))


def _specs() -> st.SearchStrategy[Spec]:
    leaves = st.builds(Spec, st.sampled_from(["leaf", "leaf", "borrow", "experts"]), st.integers(0, 7))

    def combine(parts: st.SearchStrategy[Spec]) -> st.SearchStrategy[Spec]:
        kinds = st.sampled_from(["all", "branch", "loop", "checkpoint", "no_grad", "detach", "own"])
        several = st.lists(parts, min_size=1, max_size=3).map(tuple)
        return st.builds(Spec, kinds, st.integers(0, 3), several)

    return st.recursive(leaves, combine, max_leaves=8)


SPECS = _specs()

ACTIONS = (
    "train",
    "accumulate",
    "evaluate",
    "forward only",
    "two forwards",
    "evaluate between",
    "retain",
    "zero between",
    "no backward",
    "autograd.grad",
    "look",
)

SCRIPTS = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 2)), min_size=2, max_size=6)

Script = list[tuple[str, int]]


def run_script(model: Any, optimizer: torch.optim.Optimizer, script: Script) -> list[Any]:
    """Does what the script says, each with the way through the model that it says; what came of it."""
    results: list[Any] = []
    for action, way in script:
        model.switch[0] = way
        results += list(_act(model, optimizer, action))
        results.append(model.switch[0])
    return results


def _loss(model: nn.Module) -> torch.Tensor:
    return model(torch.randn(3, WIDTH)).square().mean()


def _act(model: nn.Module, optimizer: torch.optim.Optimizer, action: str) -> Iterator[Any]:
    if action == "evaluate":
        model.eval()
        with torch.no_grad():
            yield _loss(model).item()
        model.train()
        return
    if action == "look":
        for param in model.parameters():
            with _whole(param):
                yield param.detach().clone()
        return
    loss = _loss(model)
    yield loss.item()
    if action == "forward only":
        return
    if action == "two forwards":
        loss = loss + _loss(model)
    elif action == "evaluate between":
        with torch.no_grad():
            yield _loss(model).item()
    elif action == "zero between":
        optimizer.zero_grad()
    elif action == "accumulate":
        loss.backward()
        loss = _loss(model)
    elif action == "autograd.grad":
        head = model.head.bias
        yield torch.autograd.grad(loss, head)[0]
        loss = _loss(model)
    if action == "retain" and not _reentrant(model):
        loss.backward(retain_graph=True)
    if action != "no backward":
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _reentrant(model: Any) -> bool:
    """torch cannot go twice through what a reentrant checkpoint computed."""
    return any(isinstance(m, Node) and m.spec.kind == "checkpoint" for m in model.modules())


def _whole(param: torch.Tensor) -> Any:
    import trainer

    return trainer.gathered(param)


def make(spec: Spec) -> Program:
    model = seeded(lambda: Program(spec))
    assert isinstance(model, Program)
    return model
