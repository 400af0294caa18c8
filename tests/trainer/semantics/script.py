"""A training script made of what loops do with an optimizer, to run with plain torch and with servers."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

ALL_CLASSES = (
    "SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "Adamax", "NAdam", "RAdam", "Adadelta", "ASGD", "Rprop",
)  # fmt: skip
FUSED = ("SGD", "Adam", "AdamW", "Adagrad")
"""Classes that servers run fused unless something else is said."""


class Mixed(nn.Module):
    """Parameters of several kinds: 0-d, small, one that is used every second time, one that is never used."""

    def __init__(self, rows: int = 0) -> None:
        super().__init__()
        self.first = nn.Linear(7, 70)
        self.second = nn.Linear(70, 5, bias=False)
        self.sometimes = nn.Linear(5, 5)
        self.gain = nn.Parameter(torch.tensor(0.9))
        self.unused = nn.Parameter(torch.ones(3))
        self.late = nn.Linear(5, 3)
        self.frozen = nn.Linear(5, 5)
        # Of several chunks, where it is wanted.
        self.table = nn.Embedding(rows, 517) if rows else None

    def forward(self, x: torch.Tensor, often: bool) -> torch.Tensor:
        y = self.second(torch.tanh(self.first(x))) * self.gain
        y = y + self.frozen(y)
        if often:
            y = y + self.sometimes(y)
        loss = F.mse_loss(self.late(y), x[:, :3])
        if self.table is not None:
            rows = torch.arange(3, self.table.num_embeddings, 41)
            loss = loss + self.table(rows).pow(2).mean() * 10
        return loss


@dataclass(frozen=True)
class Iteration:
    """What happens between two steps.

    zero: how gradients are dropped: before the backwards, after the step, by the module, to zeros, or not.
    clip: calls of clip functions, by name and arguments.
    freeze: what becomes of the layer `frozen`; None leaves it.
    announced: whether the last backward is said to be so, where nothing comes between it and the step.
    """

    micro_batches: int = 1
    often: bool = True
    zero: str = "after"
    clip: tuple[tuple[str, tuple[float, ...]], ...] = ()
    freeze: bool | None = None
    add_group: bool = False
    weight_decay: float | None = None
    announced: bool = False


@dataclass(frozen=True)
class Script:
    class_name: str
    options: dict[str, Any]
    scheduler: str | None = None
    iterations: tuple[Iteration, ...] = ()
    frozen: bool = True
    rows: int = 0
    tensor_lr: bool = False
    groups: dict[str, float] = field(default_factory=dict)

    @property
    def runs_fused(self) -> bool:
        return bool(self.options.get("fused")) or (
            self.class_name in FUSED and self.options.get("fused") is None and self.options.get("foreach") is None
        )


def schedulers(script: Script, optimizer: torch.optim.Optimizer) -> Any:
    cycles = ("momentum" in optimizer.defaults and optimizer.defaults["momentum"]) or "betas" in optimizer.defaults
    makers: dict[str, Callable[[], Any]] = {
        "LambdaLR": lambda: lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),
        "MultiplicativeLR": lambda: lr_scheduler.MultiplicativeLR(optimizer, lambda step: 0.95),
        "StepLR": lambda: lr_scheduler.StepLR(optimizer, 2, 0.5),
        "MultiStepLR": lambda: lr_scheduler.MultiStepLR(optimizer, [1, 3], 0.5),
        "ConstantLR": lambda: lr_scheduler.ConstantLR(optimizer, 0.5, 2),
        "LinearLR": lambda: lr_scheduler.LinearLR(optimizer, 0.3, total_iters=3),
        "ExponentialLR": lambda: lr_scheduler.ExponentialLR(optimizer, 0.7),
        "PolynomialLR": lambda: lr_scheduler.PolynomialLR(optimizer, 4),
        "CosineAnnealingLR": lambda: lr_scheduler.CosineAnnealingLR(optimizer, 4),
        "CosineAnnealingWarmRestarts": lambda: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2),
        "CyclicLR": lambda: lr_scheduler.CyclicLR(optimizer, 0.001, 0.1, 2, cycle_momentum=bool(cycles)),
        "OneCycleLR": lambda: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20, cycle_momentum=bool(cycles)),
        "ReduceLROnPlateau": lambda: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5),
        "SequentialLR": lambda: lr_scheduler.SequentialLR(
            optimizer,
            [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2), lr_scheduler.ExponentialLR(optimizer, 0.5)],
            [2],
        ),
        "ChainedScheduler": lambda: lr_scheduler.ChainedScheduler(
            [lr_scheduler.ConstantLR(optimizer, 0.1, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)]
        ),
    }
    return makers[script.scheduler]() if script.scheduler else None


SCHEDULERS = (
    "LambdaLR", "MultiplicativeLR", "StepLR", "MultiStepLR", "ConstantLR", "LinearLR", "ExponentialLR", "PolynomialLR",
    "CosineAnnealingLR", "CosineAnnealingWarmRestarts", "CyclicLR", "OneCycleLR", "ReduceLROnPlateau", "SequentialLR",
    "ChainedScheduler",
)  # fmt: skip


def build(script: Script) -> Mixed:
    torch.manual_seed(0)
    model = Mixed(script.rows)
    model.frozen.requires_grad_(not script.frozen)
    # Until there is a group for it.
    model.late.requires_grad_(False)
    return model


def param_groups(script: Script, model: Mixed) -> list[dict[str, Any]]:
    late = set(model.late.parameters())
    second = [model.second.weight, model.gain, model.unused]
    first = [p for p in model.parameters() if p not in late and not any(p is q for q in second)]
    return [{"params": first}, {"params": second, **script.groups}]


def options(script: Script) -> dict[str, Any]:
    lr = script.options.get("lr", 0.02)
    return {**script.options, "lr": torch.tensor(lr) if script.tensor_lr else lr}


def run(
    script: Script,
    model: Mixed,
    optimizer: torch.optim.Optimizer,
    clip: dict[str, Callable[..., Any]],
    step: Callable[[], None] | None = None,
) -> list[float]:
    """Runs the script; everything that it shows: losses, norms, learning rates."""
    scheduler = schedulers(script, optimizer)
    shown: list[float] = []
    generator = torch.Generator().manual_seed(1)
    for number, iteration in enumerate(script.iterations):
        if iteration.freeze is not None:
            model.frozen.requires_grad_(not iteration.freeze)
        if iteration.add_group and len(optimizer.param_groups) == 2 and scheduler is None:
            model.late.requires_grad_(True)
            optimizer.add_param_group({"params": list(model.late.parameters()), "lr": 0.05})
        if iteration.weight_decay is not None and "weight_decay" in optimizer.defaults:
            optimizer.param_groups[1]["weight_decay"] = iteration.weight_decay
        if iteration.zero == "before":
            optimizer.zero_grad()
        for part in range(iteration.micro_batches):
            loss = model(torch.randn(4, 7, generator=generator), iteration.often)
            last = part == iteration.micro_batches - 1 and iteration.announced and not iteration.clip
            with getattr(optimizer, "last_backward", contextlib.nullcontext)() if last else contextlib.nullcontext():
                (loss / iteration.micro_batches).backward()
            shown.append(loss.item())
        for name, arguments in iteration.clip:
            norm = clip[name](model.parameters(), *arguments)
            shown.append(0.0 if norm is None else norm.item())
        (step or optimizer.step)()
        if scheduler is not None:
            scheduler.step(*([1.0 + number] if script.scheduler == "ReduceLROnPlateau" else []))
        match iteration.zero:
            case "after":
                optimizer.zero_grad()
            case "zeros":
                optimizer.zero_grad(set_to_none=False)
            case "module":
                model.zero_grad()
            case "module zeros":
                model.zero_grad(set_to_none=False)
        shown += [float(group["lr"]) for group in optimizer.param_groups]
    return shown


CLIP = {"norm": torch.nn.utils.clip_grad_norm_, "value": torch.nn.utils.clip_grad_value_}


def plain(script: Script) -> tuple[list[float], dict[str, torch.Tensor], torch.optim.Optimizer]:
    """The script in plain torch, in the variant that servers choose."""
    model = build(script)
    more = {"fused": True} if script.runs_fused else {}
    optimizer = getattr(torch.optim, script.class_name)(param_groups(script, model), **{**options(script), **more})
    one_by_one = script.class_name == "SGD" and script.runs_fused
    shown = run(script, model, optimizer, CLIP, (lambda: _step_one_by_one(optimizer)) if one_by_one else None)
    return shown, {name: param.detach() for name, param in model.named_parameters()}, optimizer


def _step_one_by_one(optimizer: torch.optim.Optimizer) -> None:
    """torch's fused SGD refuses a mixture of parameters with and without momentum."""
    groups = list(optimizer.param_groups)
    for group in groups:
        for param in group["params"]:
            with _only(optimizer, group, param):
                optimizer.step()


@contextlib.contextmanager
def _only(optimizer: torch.optim.Optimizer, group: dict[str, Any], param: nn.Parameter) -> Iterator[None]:
    groups, params = optimizer.param_groups, group["params"]
    optimizer.param_groups, group["params"] = [group], [param]
    try:
        yield
    finally:
        optimizer.param_groups, group["params"] = groups, params


# ---------------------------------------------------------------- strategies

_EXTRA: dict[str, list[dict[str, Any]]] = {
    "SGD": [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.8, "dampening": 0.3}],
    "Adam": [{}, {"amsgrad": True}, {"betas": (0.8, 0.95)}],
    "AdamW": [{}, {"amsgrad": True}, {"betas": (0.8, 0.95)}],
    "Adagrad": [{}, {"lr_decay": 0.1}, {"initial_accumulator_value": 0.5}],
    "RMSprop": [{}, {"momentum": 0.9}, {"momentum": 0.9, "centered": True}],
    "NAdam": [{}, {"decoupled_weight_decay": True}],
    "RAdam": [{}, {"decoupled_weight_decay": True}],
    "ASGD": [{}, {"t0": 1.0}],
}

zeros = st.sampled_from(["after", "after", "before", "zeros", "module", "module zeros", "forgotten"])
exact_clips = st.sampled_from(
    [
        (),
        (),
        (("value", (0.003,)),),
        (("norm", (0.05, float("inf"))),),
        (("norm", (0.01, float("inf"))), ("value", (0.001,))),
    ]
)
clips = st.one_of(
    exact_clips,
    st.tuples(
        st.tuples(st.just("norm"), st.tuples(st.sampled_from([0.01, 0.1]), st.sampled_from([1.0, 2.0, 0.5, 3.0])))
    ),
    st.just((("value", (0.003,)), ("norm", (0.01, 2.0)))),
    st.just((("norm", (0.05, 1.0)), ("norm", (0.01, 2.0)))),
)


def iterations(clip: "st.SearchStrategy[Any]") -> "st.SearchStrategy[Iteration]":
    return st.builds(
        Iteration,
        micro_batches=st.integers(1, 3),
        often=st.booleans(),
        zero=zeros,
        clip=clip,
        freeze=st.sampled_from([None, None, True, False]),
        add_group=st.booleans(),
        weight_decay=st.sampled_from([None, None, 0.0, 0.1]),
        announced=st.booleans(),
    )


@st.composite
def scripts(draw: Any, class_name: str | None = None, *, large: bool = False) -> Script:
    name = class_name or draw(st.sampled_from(ALL_CLASSES))
    chosen = dict(draw(st.sampled_from(_EXTRA.get(name, [{}]))))
    chosen["lr"] = draw(st.sampled_from([0.02, 0.1]))
    if name != "Rprop":
        chosen["weight_decay"] = draw(st.sampled_from([0.0, 0.05]))
    variant: dict[str, Any] = draw(st.sampled_from([{}, {"foreach": True}, {"foreach": False}]))
    chosen |= variant
    script = Script(name, chosen)
    return Script(
        class_name=name,
        options=chosen,
        scheduler=draw(st.sampled_from([None, None, *SCHEDULERS])),
        # Norms of what is in several chunks are sums in another order.
        iterations=tuple(draw(st.lists(iterations(exact_clips if large else clips), min_size=2, max_size=5))),
        frozen=draw(st.booleans()),
        rows=4500 if large else 0,
        tensor_lr=script.runs_fused and draw(st.booleans()),
        groups={"lr": 0.03},
    )
