"""What a trainer has done to averaged gradients before their norm is taken, or an update made with them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ps.errors import InvalidRequest


@dataclass(frozen=True)
class GradientEdit:
    """One edit of the averaged gradients of some parameters.

    kind: 'scale' multiplies by `value`, 'max_value' clamps to [-value, value]; both as torch does it in place.
    value: clipping gradients that are not finite scales by NaN. That is always the same object, so that edits
        of several ranks are equal, and found again as keys.
    """

    parameters: tuple[int, ...]
    kind: Literal["scale", "max_value"]
    value: float

    def __post_init__(self) -> None:
        if math.isnan(self.value):
            object.__setattr__(self, "value", math.nan)

    def apply(self, gradient: torch.Tensor) -> None:
        """Edits a gradient in place."""
        if self.kind == "scale":
            gradient.mul_(self.value)
        else:
            gradient.clamp_(min=-self.value, max=self.value)


def check_edits(edits: Iterable[GradientEdit], num_parameters: int) -> None:
    """Raises InvalidRequest for an edit of no parameter, or of one that is not in the manifest."""
    for edit in edits:
        if not edit.parameters or max(edit.parameters) >= num_parameters:
            raise InvalidRequest("an edit of gradients has to name parameters of the manifest")


def by_parameter(edits: Iterable[GradientEdit]) -> Mapping[int, Sequence[GradientEdit]]:
    """The edits of each parameter, in their order."""
    found: dict[int, list[GradientEdit]] = {}
    for edit in edits:
        for parameter in edit.parameters:
            found.setdefault(parameter, []).append(edit)
    return found
