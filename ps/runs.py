"""Parts of a chunk, for those who need or have only some of its elements."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from protos import zero_ps_pb2 as pb
from ps.chunk import Chunk
from ps.errors import InvalidRequest

MAX_RUNS = 1 << 20
"""Of one request."""


@dataclass(frozen=True)
class Runs:
    """Runs of elements of a flattened chunk: for each its first element and the one after its last."""

    bounds: tuple[tuple[int, int], ...]

    @property
    def elements(self) -> int:
        return sum(stop - start for start, stop in self.bounds)

    def rows(self, chunk: Chunk) -> torch.Tensor:
        """A bool for each row of a chunk: whether there is any of its elements."""
        edges = torch.zeros(chunk.shape[0] + 1, dtype=torch.int32)
        if self.bounds:
            bounds = torch.tensor(self.bounds)
            ones = torch.ones(len(bounds), dtype=torch.int32)
            edges.index_add_(0, bounds[:, 0] // chunk.row_elements, ones)
            edges.index_add_(0, (bounds[:, 1] - 1) // chunk.row_elements + 1, -ones)
        return edges.cumsum(0)[:-1] > 0

    def copy_into(self, target: torch.Tensor, values: torch.Tensor) -> None:
        """Replaces what a contiguous tensor has there. values: flat, as many elements as the runs have."""
        for part, some in self._pairs(target, values):
            part.copy_(some)

    def add_into(self, target: torch.Tensor, values: torch.Tensor) -> None:
        """Adds to what a contiguous tensor has there."""
        for part, some in self._pairs(target, values):
            part.add_(some)

    def _pairs(self, target: torch.Tensor, values: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        flat = target.view(-1)
        pieces = torch.split(values, [stop - start for start, stop in self.bounds])
        return [(flat[start:stop], piece) for (start, stop), piece in zip(self.bounds, pieces, strict=True)]


def decode_runs(parts: Sequence[pb.Runs], chunks: Sequence[Chunk]) -> list[Runs | None]:
    """The parts that a message names of each chunk; None for a whole one. Raises InvalidRequest."""
    if not parts:
        return [None] * len(chunks)
    if len(parts) != len(chunks):
        raise InvalidRequest(f"{len(chunks)} chunks came with parts of {len(parts)}")
    if (runs := sum(len(each.starts) for each in parts)) > MAX_RUNS:
        raise InvalidRequest(f"a request may name {MAX_RUNS} runs of elements, not {runs}; ask for whole chunks")
    return [_decode(runs, chunk) for runs, chunk in zip(parts, chunks, strict=True)]


def _decode(runs: pb.Runs, chunk: Chunk) -> Runs | None:
    if len(runs.starts) != len(runs.counts):
        raise InvalidRequest(f"parts of {chunk.label} have {len(runs.starts)} starts and {len(runs.counts)} counts")
    bounds = []
    end = 0
    for start, count in zip(runs.starts, runs.counts, strict=True):
        if start < end or count < 1 or start + count > chunk.elements:
            raise InvalidRequest(
                f"elements {start} to {start + count} are no part of {chunk.label} after element {end}: it has "
                f"{chunk.elements} elements, and parts are ascending, apart and not empty"
            )
        end = start + count
        bounds.append((start, end))
    return None if bounds == [(0, chunk.elements)] else Runs(tuple(bounds))
