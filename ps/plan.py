"""The order in which a trainer says that it will use parameters."""

from dataclasses import dataclass
from typing import Literal

from ps.errors import InvalidRequest

MAX_USES = 1 << 18
"""How many uses one plan may name; a plan is for one iteration."""


@dataclass(frozen=True)
class PlannedUse:
    """A pull of a parameter, or the arrival of its gradient. parameter: its index in the manifest."""

    kind: Literal["pull", "gradient"]
    parameter: int


@dataclass(frozen=True)
class Plan:
    """One iteration, over and over: what is pulled and which gradients come, in order."""

    uses: tuple[PlannedUse, ...] = ()

    def check(self, num_parameters: int) -> None:
        """Raises InvalidRequest for a plan that is too long or names what is not in the manifest."""
        if len(self.uses) > MAX_USES:
            raise InvalidRequest(f"a plan may name {MAX_USES} uses, not {len(self.uses)}")
        for use in self.uses:
            if use.parameter >= num_parameters:
                raise InvalidRequest(
                    f"a plan names parameter {use.parameter}, and the manifest has {num_parameters} parameters"
                )
