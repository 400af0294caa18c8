"""Embeddings of which only the rows that a batch names are gathered, and have their gradients sent.

The rows come as a small matrix of their own, in which the inputs are looked up by their places among the
rows; the parameter itself stays released. Its gradient is what `nn.Embedding(sparse=True)` gives: a sparse
one, of which the servers get the rows. What they do with the other rows is `OffloadConfig.untouched_rows`.
"""

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from trainer.config import OffloadConfig
from trainer.errors import ConfigError
from trainer.parameter import OffloadedParameter
from trainer.selection import rows
from trainer.transfer import Destination


def choose(model: nn.Module, config: OffloadConfig) -> list[tuple[str, nn.Embedding]]:
    """The embeddings that gather rows. Raises ConfigError for what is chosen and cannot do so."""
    chosen = config.sparse_rows
    if isinstance(chosen, bool):
        # A table that another module uses whole, as an output layer, has to be whole anyway.
        users = Counter(id(param) for module in model.modules() for param in module._parameters.values())
        return [
            (name, _checked(name, module))
            for name, module in model.named_modules()
            if chosen and isinstance(module, nn.Embedding) and users[id(module.weight)] == 1
        ]
    names = {each for each in chosen if isinstance(each, str)}
    classes = tuple(each for each in chosen if not isinstance(each, str))
    modules = dict(model.named_modules())
    if missing := names - modules.keys():
        raise ConfigError(f"OffloadConfig.sparse_rows names {sorted(missing)[0]!r}, which the model does not have")
    found = [(name, module) for name, module in modules.items() if name in names or isinstance(module, classes)]
    return [(name, _checked(name, module)) for name, module in found]


def _checked(name: str, module: nn.Module) -> nn.Embedding:
    if not isinstance(module, nn.Embedding):
        raise ConfigError(f"OffloadConfig.sparse_rows: module {name!r} is no nn.Embedding but {type(module).__name__}")
    if module.max_norm is not None:
        raise ConfigError(
            f"OffloadConfig.sparse_rows: {name!r} has max_norm, which changes its weight in every forward; leave it "
            "out, or do without max_norm"
        )
    if type(module).forward is not nn.Embedding.forward or "forward" in module.__dict__:
        raise ConfigError(f"OffloadConfig.sparse_rows: {name!r} has a forward of its own; leave it out")
    return module


class RowLookup:
    """Stands for the forward of one embedding until `remove`."""

    def __init__(self, module: nn.Embedding, state: OffloadedParameter) -> None:
        self._module = module
        self._state = state
        state.by_rows = True
        module.__dict__["forward"] = self._forward

    def remove(self) -> None:
        del self._module.__dict__["forward"]
        self._state.by_rows = False

    def _forward(self, input: torch.Tensor) -> torch.Tensor:
        """As `nn.Embedding.forward`. input: indices of any shape. Raises RuntimeError, as that does, for what is no
        index, and IndexError for one that the table does not have."""
        module = self._module
        if input.dtype not in (torch.int64, torch.int32):
            raise RuntimeError(
                f"indices of {self._state.name!r} have to be torch.int64 or torch.int32, not {input.dtype}"
            )
        numbers, places = torch.unique(input, return_inverse=True)
        numbers = numbers.long()
        if numbers.numel() and not 0 <= int(numbers[0]) <= int(numbers[-1]) < module.num_embeddings:
            wrong = int(numbers[0]) if numbers[0] < 0 else int(numbers[-1])
            raise IndexError(
                f"index {wrong} is out of range of {self._state.name!r}, which has {module.num_embeddings} rows"
            )
        self._state.model.gradients.watch(self._state)
        matrix = _Rows.apply(module.weight, self._state, numbers)  # type: ignore[no-untyped-call]
        padding = None
        if module.padding_idx is not None:
            place = int(torch.searchsorted(numbers, module.padding_idx))
            if place < len(numbers) and int(numbers[place]) == module.padding_idx:
                padding = place
        return F.embedding(places, matrix, padding, None, module.norm_type, module.scale_grad_by_freq, False)


class _Rows(torch.autograd.Function):
    """Rows of a released parameter."""

    @staticmethod
    def forward(ctx: Any, weight: nn.Parameter, state: OffloadedParameter, numbers: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(numbers)
        ctx.shape = state.shape
        return _pull(state, numbers)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (numbers,) = ctx.saved_tensors
        return torch.sparse_coo_tensor(numbers[None], gradients[0], ctx.shape, check_invariants=False), None, None


def _pull(state: OffloadedParameter, numbers: torch.Tensor) -> torch.Tensor:
    """The rows with these numbers, which are ascending, on the parameter's device."""
    remote, job = state.remote, state.model.job
    assert remote is not None
    job.check()
    state.model.announcement.pulled([state])
    state.model.coordinator.pass_assignments()
    # Bytes are written by another thread, which torch would not let write to an inference tensor.
    with torch.inference_mode(False), torch.no_grad():
        values = torch.empty(len(numbers), *state.shape[1:], dtype=state.dtype)
        if values.numel():
            data = values.view(-1).view(torch.uint8)
            parts = tuple(rows(remote.grid, numbers.cpu()))
            staleness = state.model.coordinator.staleness
            pulled = [Destination(remote, data, state.dtype, parts)]
            job.transfer.pull(pulled, job.step, max_staleness=staleness).wait()
        return values.to(state.device)
