"""Gradients that are not finite, and loss scaling: what `torch.amp.GradScaler` does, where the gradients are.

A GradScaler calls one function of torch on all gradients of an optimizer: it says whether one is NaN or
infinite, and divides them by the scale. On placeholders it is answered here. Servers look at the gradients
averaged over trainers, so every rank gets the same answer, and a step is made by all of them or by none.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from trainer.errors import ConfigError
from trainer.gradient_norms import gradient_norms

if TYPE_CHECKING:
    from trainer.offload import OffloadedModel
    from trainer.parameter import OffloadedParameter


def check_and_unscale(
    states: Sequence["OffloadedParameter"], found_inf: torch.Tensor, inverse_scale: torch.Tensor
) -> None:
    """`torch._amp_foreach_non_finite_check_and_unscale_` for gradients that are on the servers.

    states: of parameters that have gradients on this trainer. What is looked at and scaled are all parameters
        of their optimizer of the same device and dtype, since other ranks may have gradients of other ones.
    found_inf: 0-d; becomes 1 if a gradient is not finite.
    inverse_scale: 0-d; the next step multiplies by it.
    """
    model, kind = states[0].model, _kind(states[0])
    if any(state.owner is not model for state in states):
        raise ConfigError("a GradScaler got gradients of several offloaded models; make one for each optimizer")
    optimizer = None if model.optimizer is None else model.optimizer()
    if optimizer is not None:
        states = [state for state in optimizer.states() if _kind(state) == kind]
    if not all_finite(model, states):
        model.gradients.found_nonfinite = True
        found_inf.fill_(1.0)
    model.gradients.edit(states, scale=inverse_scale.item())


def all_finite(model: "OffloadedModel", states: Sequence["OffloadedParameter"]) -> bool:
    """Whether every element of the averaged gradients is a number. The same on every rank; all have to ask."""
    if model.gradients.known_finite.issuperset(states):
        return True
    return all(bool(norm.isfinite()) for norm in gradient_norms(model, states, float("inf")))


def gradient_dtype(state: "OffloadedParameter") -> torch.dtype:
    """In which servers add up: fp32 whatever arrives, or fp64. What a GradScaler is told, so that it need not
    refuse gradients that are computed in fp16."""
    return torch.promote_types(state.dtype, torch.float32)


def _kind(state: "OffloadedParameter") -> tuple[torch.device, torch.dtype]:
    """By which a GradScaler puts gradients together, each kind in one call."""
    return state.device, gradient_dtype(state)
