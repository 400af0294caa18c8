"""Where the parts of a chunk are kept: the tier that counts them, and the zarr arrays that they are spilled to."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ps.store import StoredParameter
from ps.store.arrays import ChunkedArray, per_element_array
from ps.tier import SMALL_BYTES, Area, Part, Tier

Forecast = Callable[[], float]


@dataclass(frozen=True)
class Home:
    """Makes the parts of one chunk.

    area: None in a tier without a limit.
    """

    tier: Tier
    label: str
    area: Area | None = None
    parameter: StoredParameter | None = None
    index: int = 0

    def part(
        self,
        folder: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        forecast: Forecast | None = None,
        *,
        derivable: bool = False,
    ) -> Part:
        """A part without content. folder: of its array, beside those of the other parts of the chunk."""
        if folder == "weight" and self.parameter is not None and self.parameter.kind == "buffer":
            folder = "buffer"
        label = f"{folder} of {self.label}"
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if self.area is None or self.parameter is None or nbytes < SMALL_BYTES:
            return Part(label, shape, dtype)
        array = per_element_array(f"{folder}/{self.parameter.name}", self.parameter.shape, dtype)
        return Part(label, shape, dtype, (self.area, array, self.index), forecast=forecast, derivable=derivable)


IN_MEMORY = Tier()
"""A tier without a limit, for chunks that no server holds."""


def staged_part(area: Area | None, staging_id: int, chunk: int, values: torch.Tensor) -> Part:
    """A part for a chunk of which nothing is known but its size. values: a tensor of its size and dtype."""
    label = f"staged chunk {chunk} under id {staging_id}"
    elements = values.numel()
    if area is None or values.nbytes < SMALL_BYTES:
        return Part(label, (elements,), values.dtype)
    array = ChunkedArray(f"staged/{staging_id}-{chunk}", (elements,), (elements,), values.dtype)
    return Part(label, (elements,), values.dtype, (area, array, 0))
