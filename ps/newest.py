"""A chunk in the newest version that it has, for trainers that may be ahead of updates (`max_staleness`)."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from protos.segment import Arena
from ps.chunk import Chunk
from ps.errors import VersionGone
from ps.links import Block, Read
from ps.monitor import Patience
from ps.tier import Lent

Result = TypeVar("Result")


def newest_blocks(
    chunk: Chunk, bounds: Sequence[tuple[int, int]], oldest: int, newest: int, dtype: torch.dtype, patience: Patience
) -> Iterator[Block]:
    """Some elements of a chunk, all of them of one version from `oldest`, which it has reached, to `newest`.

    Which one is found out when the first of the bytes are read. Raises VersionGone if the chunk is past `newest`.
    """
    source = _Newest(chunk, bounds, oldest, newest, dtype, patience)
    for number, (first, end) in enumerate(bounds):
        nbytes = (end - first) * dtype.itemsize
        # What leaves in several blocks is read at once, as the chunk may go on between them.
        if len(bounds) == 1:
            yield Block(nbytes, source.reader(number), source.lend, first * dtype.itemsize)
        else:
            yield Block(nbytes, source.reader(number))


class _Newest:
    def __init__(
        self,
        chunk: Chunk,
        bounds: Sequence[tuple[int, int]],
        oldest: int,
        newest: int,
        dtype: torch.dtype,
        patience: Patience,
    ) -> None:
        self._chunk = chunk
        self._bounds = [(first * dtype.itemsize, end * dtype.itemsize) for first, end in bounds]
        self._oldest, self._newest = oldest, newest
        self._dtype = dtype
        self._patience = patience
        self._bytes: list[bytes] | None = None

    def reader(self, number: int) -> Read:
        def read(start: int, stop: int, head: bytes = b"") -> bytes:
            if self._bytes is None:
                self._bytes = self._at_one_version(self._read)
            return b"".join((head, memoryview(self._bytes[number])[start:stop]))

        return read

    def lend(self, arena: Arena | None) -> Lent | None:
        return self._at_one_version(lambda version: self._chunk.lend(version, self._dtype, arena, self._patience))

    def _read(self, version: int) -> list[bytes]:
        return [self._chunk.read(version, self._dtype, start, stop, self._patience) for start, stop in self._bounds]

    def _at_one_version(self, read: Callable[[int], Result]) -> Result:
        while True:
            version = max(self._oldest, min(self._chunk.version, self._newest))
            try:
                return read(version)
            except VersionGone:
                # An update came in between. There are no more of them than versions that will do.
                if self._chunk.version > self._newest:
                    raise
