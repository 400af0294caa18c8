"""An optimizer that runs on chunks gives the bits that it gives on whole parameters."""

import pytest
import torch

from protos.layout import ChunkGrid
from protos.optimizers import ALLOWED, REFUSED
from ps.chunk import Chunk
from ps.errors import InvalidRequest
from ps.optimizer import ChunkOptimizer, resolve_options, state_arrays
from ps.store import OptimizerGroup, OptimizerSpec, StateArray

SHAPES = [(), (1,), (7,), (1000, 3), (2000, 1111), (3_200_003,)]

OPTIONS = {
    "SGD": [{}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, {"momentum": 0.9, "fused": False}],
    "Adam": [
        {},
        {"amsgrad": True, "weight_decay": 0.1, "maximize": True},
        {"foreach": False},
        {"foreach": True},
    ],
    "AdamW": [{"lr": 0.01}, {"amsgrad": True}, {"fused": False}],
    "RMSprop": [{}, {"momentum": 0.9, "centered": True, "weight_decay": 0.1}],
    "NAdam": [{}, {"decoupled_weight_decay": True, "weight_decay": 0.1}],
    "ASGD": [{"t0": 1.0}],
}


class Chunked:
    """Parameters in chunks, stepped by a ChunkOptimizer."""

    def __init__(self, parameters: list[torch.Tensor], spec: OptimizerSpec) -> None:
        self.optimizer = ChunkOptimizer(spec, len(parameters))
        self.grids = [ChunkGrid.of(p.shape) for p in parameters]
        self.chunks: list[Chunk] = []
        for number, (parameter, grid) in enumerate(zip(parameters, self.grids, strict=True)):
            for index in range(grid.num_chunks):
                chunk = Chunk(number, index, "", grid.chunk_shape(index), parameter.dtype, 0)
                start, stop = grid.element_range(index)
                chunk.write(parameter.detach().reshape(-1)[start:stop].clone())
                self.chunks.append(chunk)

    def step(self, gradients: list[torch.Tensor | None]) -> None:
        for chunk in self.chunks:
            gradient = gradients[chunk.parameter]
            if gradient is not None:
                start, stop = self.grids[chunk.parameter].element_range(chunk.index)
                part = gradient.reshape(-1)[start:stop].clone().view(chunk.shape)
                self.optimizer.update([(chunk, part)])

    def whole(self, number: int) -> torch.Tensor:
        parts = [chunk.weight.tensor.reshape(-1) for chunk in self.chunks if chunk.parameter == number]
        return torch.cat(parts).view(self.grids[number].shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ALLOWED)
def test_chunks_get_the_bits_of_whole_parameters(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    choices = OPTIONS.get(name, [{}])
    for options in choices if dtype == torch.float32 else choices[-1:]:
        parameters = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
        chunked = Chunked(parameters, spec_of(name, options, len(parameters)))
        assert len(chunked.chunks) == len(parameters) + 3
        plain = plain_optimizer(name, options, parameters)
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            chunked.step([p.grad for p in parameters])
            plain.step()
        for number, parameter in enumerate(parameters):
            assert torch.equal(chunked.whole(number), parameter), (options, parameter.shape)


def test_groups_keep_their_options_and_a_schedule_changes_them() -> None:
    torch.manual_seed(0)
    parameters = [torch.randn(50, 3) for _ in range(4)]
    groups = [{"lr": 0.1, "weight_decay": 0.5}, {"lr": 0.01}]
    members = [(0, 2), (3, 1)]
    spec = OptimizerSpec("AdamW", tuple(OptimizerGroup(o, m) for o, m in zip(groups, members, strict=True)))
    chunked = Chunked(parameters, spec)
    plain = torch.optim.AdamW(
        [{"params": [parameters[i] for i in m], **o} for o, m in zip(groups, members, strict=True)],
        fused=True,
    )
    for step in range(4):
        for number, group in enumerate(plain.param_groups):
            group["lr"] = 0.1 / (step + number + 1)
        stated = [{**o, "lr": g["lr"]} for o, g in zip(groups, plain.param_groups, strict=True)]
        chunked.optimizer.set_options(chunked.optimizer.resolve(stated))
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        chunked.step([p.grad for p in parameters])
        plain.step()
    assert all(torch.equal(chunked.whole(i), p) for i, p in enumerate(parameters))


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adagrad"])
def test_a_chunk_without_a_gradient_is_left_alone(name: str) -> None:
    torch.manual_seed(0)
    options = {"lr": 0.1, "momentum": 0.9} if name == "SGD" else {"lr": 0.1}
    parameters = [torch.randn(10), torch.randn(10)]
    chunked = Chunked(parameters, spec_of(name, options, 2))
    plain = plain_optimizer(name, options, parameters)
    for step in range(4):
        parameters[0].grad = torch.randn(10)
        parameters[1].grad = torch.randn(10) if step >= 2 else None
        chunked.step([p.grad for p in parameters])
        # A fused SGD of torch itself fails over a mixture of parameters with and without momentum.
        for number in range(2):
            only(plain, parameters, number).step()
    assert all(torch.equal(chunked.whole(i), p) for i, p in enumerate(parameters))


def test_state_is_described_as_torch_keeps_it() -> None:
    assert state_arrays("AdamW", {}) == {
        "step": StateArray("step", torch.float32, False),
        "exp_avg": StateArray("exp_avg", None, True),
        "exp_avg_sq": StateArray("exp_avg_sq", None, True),
    }
    assert set(state_arrays("SGD", {})) == set()
    assert set(state_arrays("SGD", {"momentum": 0.9})) == {"momentum_buffer"}
    assert "max_exp_avg_sq" in state_arrays("Adam", {"amsgrad": True})


def test_fused_is_used_where_torch_has_it_and_nothing_else_was_said() -> None:
    fused = {name for name in ALLOWED if resolve_options(name, {})[0].get("fused")}
    assert fused == {"SGD", "Adam", "AdamW", "Adagrad"}
    assert resolve_options("AdamW", {"fused": False})[0]["fused"] is False
    assert not resolve_options("AdamW", {"foreach": True})[0]["fused"]
    assert not resolve_options("AdamW", {"foreach": False})[0]["fused"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("LBFGS", "whole model"),
        ("Muon", "whole matrices"),
        ("Adafactor", "rows and columns"),
        ("SparseAdam", "sparse"),
        ("Optimizer", "one of SGD, Adam, AdamW"),
        ("__class__", "one of SGD, Adam, AdamW"),
        ("", "one of SGD, Adam, AdamW"),
    ],
)
def test_classes_that_are_not_element_wise_are_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        resolve_options(name, {})


def test_every_class_of_the_installed_torch_is_allowed_or_refused_with_a_reason() -> None:
    classes = {
        name
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    assert classes == {*ALLOWED, *REFUSED}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate"),
        ({"lr": "fast"}, "refuses"),
        ({"betas": (0.9,)}, "refuses"),
        ({"betas": (0.9, 1.5)}, "Invalid beta"),
        ({"momentum": 0.9}, "has no option 'momentum'"),
        ({"params": 1}, "has no option 'params'"),
        ({"capturable": True}, "no meaning on a parameter server"),
        ({"differentiable": True}, "no meaning on a parameter server"),
        ({"fused": True, "foreach": True}, "cannot be `True` together"),
    ],
)
def test_options_that_torch_refuses_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        resolve_options("AdamW", options)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((), "at least one"),
        ((OptimizerGroup({}, (0, 2)),), "parameter 2 is not in the manifest"),
        ((OptimizerGroup({}, (0, 1)), OptimizerGroup({}, (1,))), "more than one"),
    ],
)
def test_groups_that_make_no_sense_are_refused(groups: tuple[OptimizerGroup, ...], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        ChunkOptimizer(OptimizerSpec("SGD", groups), num_parameters=2)


def spec_of(name: str, options: dict, num_parameters: int) -> OptimizerSpec:
    return OptimizerSpec(name, (OptimizerGroup(options, tuple(range(num_parameters))),))


def plain_optimizer(name: str, options: dict, parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    """Plain torch, in the variant that the servers choose."""
    fused = {"fused": True} if resolve_options(name, options)[0].get("fused") else {}
    return getattr(torch.optim, name)(parameters, **{**options, **fused})


def only(optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor], number: int) -> torch.optim.Optimizer:
    """The optimizer, with one of its parameters in its group."""
    optimizer.param_groups[0]["params"] = [parameters[number]]
    return optimizer
