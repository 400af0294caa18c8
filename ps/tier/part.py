"""What a tier counts and moves: one tensor of a chunk."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from protos.segment import Arena
from ps.store import ChunkFile, checksum
from ps.store.arrays import ChunkedArray
from ps.store.direct import page_aligned
from ps.tier.area import Area
from ps.tier.buffers import Buffer
from ps.tier.lent import Lent

SMALL_BYTES = 64 << 10
"""What is smaller stays in memory: an access to the disk would cost more than the room it takes."""

NEVER = float("inf")
"""The next use of what will be replaced before anybody reads it."""


class Part:
    """One tensor: a weight, a state tensor, an accumulator, the weight in another dtype.

    label: for messages. place: where it is spilled to, as a chunk of a zarr array; None if it never is.
    forecast: when it is used next, on a scale of the job's own; None where nobody can tell.
    derivable: whether it can be made again from another part, and so be dropped instead of being written.
    filled: whether it has content, here or on disk.
    committed: the generation's file that the part's own is another name of; None for what was written here.
    crc32c: of the part's file, padding included; None if nobody has counted it.

    The rest belongs to the tier. `tensor` may be used by whoever holds a lease of the part, and always where
    there is no place.
    """

    __slots__ = (
        "area",
        "arena",
        "array",
        "buffer",
        "busy",
        "chunk",
        "committed",
        "compared",
        "crc32c",
        "derivable",
        "discarded",
        "dtype",
        "entry",
        "error",
        "filled",
        "forecast",
        "label",
        "lent",
        "nbytes",
        "next_use",
        "pins",
        "plain",
        "saved_stamp",
        "shape",
        "size",
        "stamp",
    )

    def __init__(
        self,
        label: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        place: tuple[Area, ChunkedArray, int] | None = None,
        *,
        forecast: Callable[[], float] | None = None,
        derivable: bool = False,
    ) -> None:
        self.label = label
        self.shape = shape
        self.dtype = dtype
        self.nbytes = torch.Size(shape).numel() * dtype.itemsize
        self.size = page_aligned(self.nbytes)
        self.area: Area | None = None
        self.array: ChunkedArray | None = None
        self.chunk = 0
        if place is not None:
            self.area, self.array, self.chunk = place
        self.forecast = forecast
        self.derivable = derivable
        self.filled = False
        self.plain: torch.Tensor | None = None
        # Of `plain`, if somebody was lent it.
        self.lent: Lent | None = None
        # In which others have read `plain`; None where nobody has.
        self.arena: Arena | None = None
        self.buffer: Buffer | None = None
        self.busy: Literal["loading", "writing"] | None = None
        self.discarded = False
        self.error: Exception | None = None
        self.committed: ChunkFile | None = None
        # Whether the checksum of what was committed has been compared: once is enough.
        self.compared = False
        self.crc32c: int | None = None
        self.pins = 0
        # Content is counted, so that a write which was overtaken by a change is not taken for the newest.
        self.stamp = 0
        self.saved_stamp = -1
        self.next_use: float = 0
        self.entry = -1

    @property
    def spillable(self) -> bool:
        return self.area is not None

    @property
    def clean(self) -> bool:
        """Whether the file has what the part has."""
        return self.filled and self.saved_stamp == self.stamp

    @property
    def tensor(self) -> torch.Tensor:
        if self.area is None:
            if self.plain is None:
                self.plain = torch.empty(self.shape, dtype=self.dtype)
            return self.plain
        assert self.buffer is not None, self.label
        return self.buffer.view(self.shape, self.dtype, self.nbytes)

    @property
    def resident_bytes(self) -> int:
        if self.area is not None:
            return self.size if self.buffer is not None else 0
        return 0 if self.plain is None else self.plain.nbytes

    # ------------------------------------------------------------ reading it where it is

    def lend(self, arena: Arena | None) -> Lent | None:
        """Has the content read where it is, until it is given back; None where the part may leave memory.

        arena: in which it has to be; None where this process reads it.
        Expects the content to be there, and that nobody changes it meanwhile. Raises MemoryError.
        """
        if self.area is not None or self.plain is None:
            return None
        if arena is not None and arena.offset_of(self.plain) is None:
            # Who reads it where it was goes on there.
            shared = self._room_in(arena)
            shared.copy_(self.plain)
            self.plain, self.arena = shared, arena
        if self.lent is None or self.lent.tensor.data_ptr() != self.plain.data_ptr():
            self.lent = Lent(self.plain)
        self.lent.lend()
        return self.lent

    def allocate_in(self, arena: Arena) -> None:
        """What will be lent is put where it can be from the start. Does nothing where there is memory already."""
        if self.area is None and self.plain is None:
            self.plain, self.arena = self._room_in(arena), arena

    def about_to_change(self, *, keep: bool = True) -> None:
        """Moves the content away from those who read it; keep: it is needed itself, and not only its room."""
        lent = self.lent
        if lent is None or self.plain is None or not lent.readers or lent.tensor.data_ptr() != self.plain.data_ptr():
            return
        try:
            moved = self._room_in(self.arena)
        except MemoryError:
            moved = self._room_in(None)
        if keep:
            moved.copy_(self.plain)
        self.plain, self.lent = moved, None

    def _room_in(self, arena: Arena | None) -> torch.Tensor:
        """arena: None for memory of this process alone. Raises MemoryError."""
        if arena is None:
            return torch.empty(self.shape, dtype=self.dtype)
        return arena.take(self.nbytes).view(self.dtype).view(self.shape)

    def hold(self, tensor: torch.Tensor) -> None:
        """Has this content from now on; expects a lease. The tensor becomes the part's if that has none."""
        if self.area is None:
            self.plain = tensor
        elif tensor.data_ptr() != self.tensor.data_ptr():
            self.tensor.copy_(tensor)
        self.changed()

    def changed(self) -> None:
        """The tensor has new content; expects a lease."""
        self.filled = True
        self.stamp += 1

    @property
    def file(self) -> ChunkFile | None:
        """Where the content is on disk, if it is there: a file that will never be written again."""
        if self.area is None or self.array is None or not self.clean:
            return None
        return ChunkFile(Path(self.area.path(self.array, self.chunk)), self.crc32c)

    # ------------------------------------------------------------ for the tier

    def remove_file(self) -> None:
        """Gives up the file of a part that was discarded."""
        if self.area is not None and self.array is not None and self.saved_stamp >= 0 and self.busy is None:
            self.area.discard(self.array, self.chunk)

    def give_file(self, target: "Part") -> bool:
        """Makes the part's file that of another part. Raises StorageFailed."""
        assert self.area is not None and self.array is not None
        assert target.area is not None and target.array is not None
        target.area.take(self.area.path(self.array, self.chunk), target.array, target.chunk, target.label)
        target.committed, target.crc32c = None, None
        return True

    def link(self, file: ChunkFile) -> None:
        """Makes a file the part's own, too. Raises StorageFailed."""
        assert self.area is not None and self.array is not None
        self.area.link(self.array, self.chunk, file.path, self.label)
        self.committed, self.compared, self.crc32c = file, False, file.crc32c

    def load(self) -> None:
        assert self.area is not None and self.array is not None and self.buffer is not None
        what = (self.array, self.chunk, self.buffer.data.numpy().data, self.nbytes, self.label)
        if self.committed is None:
            self.area.read(*what)
        else:
            self.area.read_committed(*what, self.committed.path, None if self.compared else self.committed.crc32c)
            self.compared = True

    def save(self, *, counted: bool) -> None:
        """counted: also counts the checksum, which takes a tenth of the time that a fast disk takes to write."""
        assert self.area is not None and self.array is not None and self.buffer is not None
        self.area.write(self.array, self.chunk, self.buffer.data.numpy().data, self.nbytes, self.label)
        self.committed = None
        data = self.buffer.data[: self.nbytes]
        self.crc32c = checksum.crc32c(data, self.array.chunk_bytes) if counted else None
