"""Reads the chunks of one generation back, ahead of whoever takes them."""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from protos.layout import ChunkGrid, place_all
from ps.store import checksum
from ps.store.arrays import ChunkedArray, state_array, value_array
from ps.store.chunk_file import read_file, reason_of
from ps.store.chunk_files import ChunkFiles, Span
from ps.store.contents import ChunkFile, ChunkState, ChunkValue, GenerationHeader, StateArray
from ps.store.errors import DamagedError
from ps.store.shard_file import HeldChunks

BATCH_BYTES = 16 << 20
"""Chunks are read in batches of about this size, one allocation and one call each."""

THREADS = 4
"""Batches in flight. Measured: one or two leave the disk idle in between, more gain nothing."""

V = TypeVar("V", bound=ChunkValue)


@dataclass(frozen=True)
class _Tensor:
    """One file to read, and the tensor that it becomes."""

    folder: Path
    array: ChunkedArray
    chunk: int
    shape: tuple[int, ...]
    name: str | None  # of optimizer state; None for the weight

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.array.dtype.itemsize


@dataclass(frozen=True)
class _Chunk:
    parameter: int
    chunk: int
    tensors: tuple[_Tensor, ...]


class ChunkReader:
    """Reads a shard's chunks in the order of the manifest.

    parts: the generation's folders, one on each disk, and what is in each.
    remedy: what a message tells to do about a damaged file.
    """

    def __init__(
        self,
        parts: Mapping[Path, HeldChunks],
        header: GenerationHeader,
        states: dict[str, StateArray],
        remedy: str,
    ) -> None:
        self._parts = parts
        self._header = header
        self._states = states
        self._remedy = remedy
        self._files = {folder: ChunkFiles(folder) for folder in parts}

    def __iter__(self) -> Iterator[ChunkState[torch.Tensor]]:
        """Every chunk, its files' checksums compared where the generation has some.

        The tensors of chunks that are small, or neighbours of small ones, may be views of one allocation of
        about `BATCH_BYTES`. Raises DamagedError, naming the file.
        """
        running: deque[Future[list[ChunkState[torch.Tensor]]]] = deque()
        threads = THREADS * len(self._parts)
        executor = ThreadPoolExecutor(threads, thread_name_prefix="store-read")
        try:
            for batch in self._batches():
                running.append(executor.submit(self._read, batch))
                if len(running) > threads:
                    yield from running.popleft().result()
            while running:
                yield from running.popleft().result()
        finally:
            executor.shutdown(cancel_futures=True)

    def files(self) -> Iterator[ChunkState[ChunkFile]]:
        """The file of every chunk, none of them looked at. Raises DamagedError if one is not listed."""
        for chunk in self._chunks():
            yield _as_state(chunk, {tensor.name: self._file(tensor) for tensor in chunk.tensors})

    def _file(self, tensor: _Tensor) -> ChunkFile:
        return ChunkFile(
            tensor.folder / tensor.array.chunk_key(tensor.chunk),
            self._parts[tensor.folder].crc32c(tensor.array, tensor.chunk),
            synced=True,
            encoding=tensor.array.encoding,
        )

    def _chunks(self) -> Iterator[_Chunk]:
        header = self._header
        placement = place_all([p.shape for p in header.manifest], header.num_shards)
        for index, (parameter, shards) in enumerate(zip(header.manifest, placement, strict=True)):
            grid = ChunkGrid.of(parameter.shape)
            for chunk, shard in enumerate(shards):
                if shard != header.shard:
                    continue
                shape = grid.chunk_shape(chunk)
                weight = value_array(parameter)
                folder = self._place(weight, chunk)
                if folder is None:
                    places = " and ".join(map(str, self._parts))
                    raise DamagedError(
                        f"the generation in {places} does not list chunk {chunk} of {weight.path}, "
                        f"which shard {header.shard}/{header.num_shards} holds; {self._remedy}"
                    )
                tensors = [_Tensor(folder, weight, chunk, shape, None)]
                for state in self._states.values() if parameter.has_state else ():
                    array = state_array(parameter, state)
                    folder = self._place(array, chunk)
                    if folder is not None:
                        tensors.append(_Tensor(folder, array, chunk, shape if state.per_element else (), state.name))
                yield _Chunk(index, chunk, tuple(tensors))

    def _place(self, array: ChunkedArray, chunk: int) -> Path | None:
        return next((folder for folder, held in self._parts.items() if (array, chunk) in held), None)

    def _batches(self) -> Iterator[list[_Chunk]]:
        batch: list[_Chunk] = []
        size = 0
        for chunk in self._chunks():
            chunk_bytes = sum(tensor.bytes for tensor in chunk.tensors)
            if batch and size + chunk_bytes > BATCH_BYTES:
                yield batch
                batch, size = [], 0
            batch.append(chunk)
            size += chunk_bytes
        if batch:
            yield batch

    def _read(self, batch: list[_Chunk]) -> list[ChunkState[torch.Tensor]]:
        spans, offset = [], 0
        tensors = [tensor for chunk in batch for tensor in chunk.tensors]
        for tensor in tensors:
            span = Span(tensor.array.chunk_key(tensor.chunk), tensor.array.chunk_bytes, offset, tensor.bytes)
            if tensor.array.encoding is None:
                self._check_size(tensor.folder / span.key, span)
            spans.append(span)
            # Each tensor begins where any dtype may, and on a cache line.
            offset += -(-tensor.bytes // 64) * 64
        buffer = torch.empty(offset, dtype=torch.uint8)
        pairs = list(zip(tensors, spans, strict=True))
        for folder, files in self._files.items():
            here = [span for tensor, span in pairs if tensor.folder == folder and tensor.array.encoding is None]
            try:
                files.read(here, buffer)
            except OSError as error:
                file = _first_unreadable([folder / span.key for span in here]) or folder
                raise DamagedError(f"cannot read {file}: {reason_of(error)}; {self._remedy}") from error
        for tensor, span in pairs:
            into = buffer[span.offset : span.offset + span.size]
            if tensor.array.encoding is None:
                self._check_bytes(tensor, span, into)
            else:
                into.numpy()[:] = read_file(self._file(tensor), self._remedy)[: span.size]
        places = iter(spans)
        return [_assemble(chunk, places, buffer) for chunk in batch]

    def _check_size(self, file: Path, span: Span) -> None:
        try:
            size = file.stat().st_size
        except OSError as error:
            raise DamagedError(f"cannot read {file}: {error.strerror}; {self._remedy}") from error
        if size != span.file_bytes:
            raise DamagedError(f"{file} has {size} bytes, and the chunk has {span.file_bytes}; {self._remedy}")

    def _check_bytes(self, tensor: _Tensor, span: Span, read: torch.Tensor) -> None:
        expected = self._parts[tensor.folder].crc32c(tensor.array, tensor.chunk)
        # The padding of an array's last chunk is not read. It was zeros when it was written.
        if expected is not None and (found := checksum.crc32c(read, span.file_bytes)) != expected:
            raise DamagedError(
                f"{tensor.folder / span.key} is damaged: its CRC32C is {found:08x}, and it was written with "
                f"{expected:08x}; {self._remedy}"
            )


def _first_unreadable(files: Iterable[Path]) -> Path | None:
    """Of files that were to be read in one call, which does not say of which one it is that it failed."""
    for file in files:
        try:
            checksum.of_file(file)
        except OSError:
            return file
    return None


def _assemble(chunk: _Chunk, places: Iterator[Span], buffer: torch.Tensor) -> ChunkState[torch.Tensor]:
    tensors: dict[str | None, torch.Tensor] = {}
    for tensor in chunk.tensors:
        span = next(places)
        part = buffer[span.offset : span.offset + span.size]
        tensors[tensor.name] = part.view(tensor.array.dtype).view(tensor.shape)
    return _as_state(chunk, tensors)


def _as_state(chunk: _Chunk, values: dict[str | None, V]) -> ChunkState[V]:
    weight = values.pop(None)
    return ChunkState(chunk.parameter, chunk.chunk, weight, {str(name): value for name, value in values.items()})
