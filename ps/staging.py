"""Weights of a model under construction: rank 0 sends them before there is a manifest that lists them."""

from collections.abc import Sequence

import torch

from ps.chunk import Chunk, byte_view
from ps.errors import InvalidRequest, ServerFull
from ps.home import staged_part
from ps.links import Read
from ps.tier import Area, Incoming, Part, Tier

MAX_STAGED = 1 << 18


class Staging:
    """Staged chunks of one session: flat tensors by staging id and chunk index.

    areas: where they are spilled to, on each disk; none in a tier without a limit.
    """

    def __init__(self, tier: Tier, areas: Sequence[Area]) -> None:
        self._tier = tier
        self._areas = areas
        self._elements_on = [0] * len(areas)
        self._staged: dict[tuple[int, int], Part] = {}

    def put(self, staging_id: int, chunk: int, values: Incoming) -> None:
        """Raises OutOfBudget for more small chunks than memory is for, ServerFull for more than any model has."""
        if len(self._staged) >= MAX_STAGED and (staging_id, chunk) not in self._staged:
            raise ServerFull(f"{MAX_STAGED} chunks are staged, the most that a server may have of a job")
        part = staged_part(self._next_area(values.tensor.numel()), staging_id, chunk, values.tensor)
        if self._tier.limited and not part.spillable:
            self._tier.reserve(self, self._small_bytes + part.nbytes, "staging small chunks")
        self._tier.adopt(part, values)
        replaced = self._staged.get((staging_id, chunk))
        self._staged[staging_id, chunk] = part
        if replaced is not None:
            self._tier.discard([replaced])

    def read(self, staging_id: int, chunk: int, dtype: torch.dtype | None) -> tuple[int, Read]:
        """The size of a staged chunk in `dtype`, and how to read a range of it.

        Raises InvalidRequest if there is none.
        """
        part = self._staged.get((staging_id, chunk))
        if part is None:
            raise InvalidRequest(f"there is no staged chunk {chunk} under id {staging_id}")
        wanted = part.dtype if dtype is None else dtype

        def read(start: int, stop: int, head: bytes = b"") -> bytes:
            with self._tier.lease([part]):
                if not part.filled:
                    raise InvalidRequest(f"staged chunk {chunk} under id {staging_id} is gone")
                values = part.tensor[start // wanted.itemsize : stop // wanted.itemsize]
                return b"".join((head, byte_view(values.to(wanted))))

        return part.nbytes // part.dtype.itemsize * wanted.itemsize, read

    def take(self, staging_id: int, chunk: Chunk) -> Part | None:
        """Removes and returns what was staged for a chunk, or None. Raises InvalidRequest on a wrong size."""
        staged = self._staged.get((staging_id, chunk.index))
        if staged is None:
            return None
        elements = staged.nbytes // staged.dtype.itemsize
        if elements != chunk.elements:
            raise InvalidRequest(f"{chunk.label} has {chunk.elements} elements, and {elements} were staged for it")
        del self._staged[staging_id, chunk.index]
        if not staged.spillable:
            self._tier.reserve(self, self._small_bytes, "staging small chunks")
        return staged

    def clear(self) -> None:
        staged, self._staged = list(self._staged.values()), {}
        self._tier.discard(staged)
        self._tier.unreserve(self)

    def close(self) -> None:
        """The session has ended."""
        self.clear()
        for area in self._areas:
            area.drop()

    @property
    def resident_bytes(self) -> int:
        return sum(staged.resident_bytes for staged in list(self._staged.values()))

    def _next_area(self, elements: int) -> Area | None:
        """That of the disk with least on it. Chunks come about in the order of the manifest, in which `spread`
        places them by the same rule: so most are where they will stay."""
        if not self._areas:
            return None
        disk = min(range(len(self._areas)), key=self._elements_on.__getitem__)
        self._elements_on[disk] += elements
        return self._areas[disk]

    @property
    def _small_bytes(self) -> int:
        return sum(part.nbytes for part in list(self._staged.values()) if not part.spillable)
