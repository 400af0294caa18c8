"""Weights of a model under construction: rank 0 sends them before there is a manifest that lists them."""

import torch

from ps.chunk import Chunk, byte_view
from ps.errors import InvalidRequest


class Staging:
    """Staged chunks of one session: flat tensors by staging id and chunk index."""

    def __init__(self) -> None:
        self._staged: dict[tuple[int, int], torch.Tensor] = {}

    def put(self, staging_id: int, chunk: int, values: torch.Tensor) -> None:
        self._staged[staging_id, chunk] = values

    def read(self, staging_id: int, chunk: int, dtype: torch.dtype | None) -> memoryview:
        """The bytes of a staged chunk. Raises InvalidRequest if there is none."""
        staged = self._staged.get((staging_id, chunk))
        if staged is None:
            raise InvalidRequest(f"there is no staged chunk {chunk} under id {staging_id}")
        return byte_view(staged if dtype is None or dtype == staged.dtype else staged.to(dtype))

    def take(self, staging_id: int, chunk: Chunk) -> torch.Tensor | None:
        """Removes and returns what was staged for a chunk, or None. Raises InvalidRequest on a wrong size."""
        staged = self._staged.get((staging_id, chunk.index))
        if staged is None:
            return None
        if staged.numel() != chunk.elements:
            raise InvalidRequest(
                f"{chunk.label} has {chunk.elements} elements, and {staged.numel()} were staged for it"
            )
        del self._staged[staging_id, chunk.index]
        return staged

    def clear(self) -> None:
        self._staged.clear()

    @property
    def resident_bytes(self) -> int:
        return sum(staged.nbytes for staged in list(self._staged.values()))
