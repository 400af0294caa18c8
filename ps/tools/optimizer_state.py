"""How the optimizer of a commit is described outside it: to torch, and to people who read JSON."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from protos.values import Option
from ps.optimizer import optimizer_class
from ps.store.contents import OptimizerSpec, StoredParameter
from ps.tools.whole import WholeTensor


def description(spec: OptimizerSpec, manifest: Sequence[StoredParameter]) -> dict[str, object]:
    """As JSON: the class, and each group's options and the names of its parameters."""
    return {
        "class_name": spec.class_name,
        "groups": [
            {
                "options": {name: _json(option) for name, option in sorted(group.options.items())},
                "parameters": [manifest[index].name for index in group.parameters],
            }
            for group in spec.groups
        ],
    }


def torch_state_dict(spec: OptimizerSpec, state: dict[WholeTensor, torch.Tensor]) -> dict[str, Any]:
    """As `torch.optim.Optimizer.state_dict` gives it: parameters are numbered through the groups.

    state: the tensors of every parameter that is in a group.
    """
    numbers: dict[int, int] = {}
    groups = []
    # What the class has come to know since the commit gets its default, as in Optimizer.__setstate__.
    defaults = optimizer_class(spec.class_name)([torch.zeros(1)]).defaults  # type: ignore[call-arg]
    for group in spec.groups:
        own = {parameter: len(numbers) + i for i, parameter in enumerate(group.parameters)}
        numbers.update(own)
        groups.append({**defaults, **group.options, "params": list(own.values())})
    by_parameter: dict[int, dict[str, torch.Tensor]] = {}
    for tensor, value in state.items():
        assert tensor.state is not None
        by_parameter.setdefault(numbers[tensor.parameter], {})[tensor.state] = value
    return {"state": by_parameter, "param_groups": groups}


def _json(option: Option) -> object:
    if isinstance(option, tuple):
        return [_json(number) for number in option]
    if isinstance(option, float) and not math.isfinite(option):
        return str(option)
    return option
