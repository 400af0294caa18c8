"""Which rows make a chunk, and which server holds it.

Both are pure functions of the manifest, so that servers, trainers and tools compute them alike and no
table has to travel or be stored.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

CHUNK_BYTES = 4 << 20
"""Chunks have at least this many bytes in fp32 (a parameter that is smaller is one chunk) and, unless
one row alone is longer, less than twice as many. Measured: 4 to 16 MiB is where batched I/O is fastest."""

ALIGN_ELEMENTS = 64
"""Where rows allow it a chunk begins at a multiple of this many elements of its parameter. Fused
optimizer kernels treat whole vectors and the remainder differently, so this keeps their bits
independent of how a parameter is split."""

_FP32_BYTES = 4


@dataclass(frozen=True)
class ChunkGrid:
    """How one parameter is cut into chunks along dim 0.

    shape: the parameter's shape; a 0-d parameter has one row of one element.
    chunk_rows: rows of every chunk but the last, which may have fewer.
    """

    shape: tuple[int, ...]
    rows: int
    row_elements: int
    chunk_rows: int

    @staticmethod
    def of(shape: Sequence[int]) -> "ChunkGrid":
        """The grid of a parameter of this shape. An empty parameter (a dimension of 0) has no chunk."""
        shape = tuple(shape)
        rows = shape[0] if shape else 1
        row_elements = math.prod(shape[1:])
        if rows == 0 or row_elements == 0:
            return ChunkGrid(shape, rows, row_elements, max(rows, 1))
        count = max(1, rows * row_elements * _FP32_BYTES // CHUNK_BYTES)
        chunk_rows = math.ceil(rows / count)
        step = ALIGN_ELEMENTS // math.gcd(row_elements, ALIGN_ELEMENTS)
        aligned = math.ceil(chunk_rows / step) * step
        if aligned * row_elements * _FP32_BYTES <= 2 * CHUNK_BYTES:
            chunk_rows = aligned
        return ChunkGrid(shape, rows, row_elements, min(chunk_rows, rows))

    @property
    def num_chunks(self) -> int:
        if self.rows == 0 or self.row_elements == 0:
            return 0
        return math.ceil(self.rows / self.chunk_rows)

    def row_range(self, chunk: int) -> tuple[int, int]:
        """First row of a chunk and the one after its last."""
        start = chunk * self.chunk_rows
        return start, min(start + self.chunk_rows, self.rows)

    def element_range(self, chunk: int) -> tuple[int, int]:
        """The chunk's place in the flattened parameter, in elements."""
        start, stop = self.row_range(chunk)
        return start * self.row_elements, stop * self.row_elements

    def chunk_elements(self, chunk: int) -> int:
        start, stop = self.element_range(chunk)
        return stop - start

    def chunk_shape(self, chunk: int) -> tuple[int, ...]:
        """The shape of the chunk as an array: () for a 0-d parameter."""
        if not self.shape:
            return ()
        start, stop = self.row_range(chunk)
        return (stop - start, *self.shape[1:])


class Placement:
    """Gives every chunk, in the order of the manifest, to the server that has the fewest bytes so far.

    Successive chunks go to different servers, so each layer is spread over all of them, and no two
    servers differ by more than one chunk. Ties go to the lower shard.
    """

    def __init__(self, num_shards: int) -> None:
        if num_shards < 1:
            raise ValueError(f"num_shards has to be at least 1, not {num_shards}")
        self._bytes = [0] * num_shards

    def place(self, grid: ChunkGrid) -> tuple[int, ...]:
        """The shard of each chunk of the next parameter."""
        shards = []
        for chunk in range(grid.num_chunks):
            shard = min(range(len(self._bytes)), key=self._bytes.__getitem__)
            self._bytes[shard] += grid.chunk_elements(chunk) * _FP32_BYTES
            shards.append(shard)
        return tuple(shards)


def place_all(shapes: Iterable[Sequence[int]], num_shards: int) -> list[tuple[int, ...]]:
    """For each parameter, in the order of the manifest, the shard of each of its chunks."""
    placement = Placement(num_shards)
    return [placement.place(ChunkGrid.of(shape)) for shape in shapes]


def digest(placement: Iterable[tuple[int, ...]]) -> str:
    """A short hash by which two processes find out whether they computed the same placement."""
    text = ";".join(",".join(map(str, shards)) for shards in placement)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
