"""Clipping of gradients where they are. Arguments, results and errors are those of `torch.nn.utils`."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from trainer.errors import ConfigError
from trainer.gradient_norms import gradient_norms, total_norm
from trainer.offload import OffloadedModel
from trainer.parameter import OffloadedParameter, offloaded

if TYPE_CHECKING:
    Parameters = torch.Tensor | Iterable[torch.Tensor]


def clip_grad_norm_(
    parameters: "Parameters",
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """Clips the gradients of offloaded parameters to a global norm, where they are.

    The norm is that of the gradients averaged over trainers, so every rank has to call this, after its
    last backward of the step; the factor is applied by the next `step`.

    norm_type: any number; infinity for the largest absolute value.
    error_if_nonfinite: raises RuntimeError, on every rank, if the norm is NaN or infinite, and clips nothing.
    foreach: means nothing here; servers choose.

    Returns the norm before clipping, a 0-d tensor, as `torch.nn.utils.clip_grad_norm_` does.
    """
    model, states = _model_of(parameters, "clip_grad_norm_")
    norm_type = float(norm_type)
    if model is None:
        return torch.tensor(0.0)
    norms = gradient_norms(model, states, norm_type)
    if model.job.world_size == 1:
        # torch leaves out what has no gradient, and sums depend on what is among their terms.
        norms = [norm for state, norm in zip(states, norms, strict=True) if model.gradients.has(state)]
    norm = total_norm(norms, norm_type).to(states[0].device)
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be "
            "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
            "`error_if_nonfinite=False`"
        )
    factor = torch.clamp(float(max_norm) / (norm + 1e-6), max=1.0).item()
    model.gradients.edit(states, scale=factor)
    return norm


def clip_grad_value_(parameters: "Parameters", clip_value: float, foreach: bool | None = None) -> None:
    """Clips every element of the gradients of offloaded parameters to [-clip_value, clip_value], where they are.

    What is clipped are the gradients averaged over trainers, by the next `step`; every rank has to call this,
    after its last backward of the step. As `torch.nn.utils.clip_grad_value_`.

    foreach: means nothing here; servers choose.
    """
    model, states = _model_of(parameters, "clip_grad_value_")
    if model is not None:
        model.gradients.edit(states, max_value=float(clip_value))


def _model_of(parameters: "Parameters", what: str) -> tuple[OffloadedModel | None, list[OffloadedParameter]]:
    """The model that parameters are of, and their states; no model if there are none that have elements."""
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    states = list(dict.fromkeys(s for p in parameters if (s := offloaded(p)) is not None))
    if len(states) < sum(p.numel() > 0 for p in dict.fromkeys(parameters)):
        raise ConfigError(
            f"{what} got a parameter that is not offloaded; clip what stays local with torch.nn.utils.{what}"
        )
    if not states:
        return None, []
    owner = states[0].owner
    if not isinstance(owner, OffloadedModel) or any(state.owner is not owner for state in states):
        raise ConfigError(f"{what} needs the parameters of one offloaded model")
    owner.job.check()
    return owner, states
