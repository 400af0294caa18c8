"""Writes chunks while they are being handed over: many files in flight, synced as they go."""

from collections import defaultdict, deque
from concurrent.futures import Executor, Future
from pathlib import Path

import torch

from protos.layout import ChunkGrid, place_all
from ps.store import durable
from ps.store.arrays import ChunkedArray, state_array, value_array
from ps.store.chunk_files import ChunkFiles, Span
from ps.store.contents import ChunkState, GenerationHeader, StateArray

IN_FLIGHT = 32
"""Write calls begun and not finished. More hide no more of the disk's latency and hold more chunks."""

DIRECT_BYTES = 1 << 20
"""A tensor of at least this size is written from where it is, in a call of its own. Smaller ones are
copied together first: a call costs half a millisecond, however little it writes."""

TOGETHER = 32
"""The most small tensors of one call: each is a file, and a call's files are synced one after another."""

_File = tuple[str, torch.Tensor, int]


class ChunkWriter:
    """Writes the chunks of one generation into a folder. Used by one thread.

    Tensors must not change until `finish` has returned: large ones are written without a copy.
    """

    def __init__(
        self, folder: Path, header: GenerationHeader, states: dict[str, StateArray], executor: Executor
    ) -> None:
        self._folder = folder
        self._header = header
        self._states = states
        self._executor = executor
        self._files = ChunkFiles(folder)
        placement = place_all([p.shape for p in header.manifest], header.num_shards)
        self._missing = {
            (parameter, chunk)
            for parameter, shards in enumerate(placement)
            for chunk, shard in enumerate(shards)
            if shard == header.shard
        }
        self._running: deque[Future[None]] = deque()
        self._small: list[_File] = []
        self._small_bytes = 0
        self._written: dict[ChunkedArray, list[int]] = defaultdict(list)

    def add(self, chunk: ChunkState) -> None:
        """Takes one chunk. Raises ValueError for a chunk that is not this shard's, was added before, or
        does not have the shapes and dtypes that header and state arrays state; OSError if a write fails.
        """
        header = self._header
        place = (chunk.parameter, chunk.chunk)
        if place not in self._missing:
            raise ValueError(
                f"chunk {chunk.chunk} of parameter {chunk.parameter} is not one of shard "
                f"{header.shard}/{header.num_shards}, or came twice"
            )
        self._missing.remove(place)
        parameter = header.manifest[chunk.parameter]
        shape = ChunkGrid.of(parameter.shape).chunk_shape(chunk.chunk)
        self._add(value_array(parameter), chunk.chunk, chunk.weight, shape)
        if chunk.state and not parameter.has_state:
            raise ValueError(f"{parameter.name!r} is not trained and cannot have optimizer state")
        for name, tensor in chunk.state.items():
            if name not in self._states:
                raise ValueError(f"state {name!r} of {parameter.name!r} is not among {sorted(self._states)}")
            state = self._states[name]
            self._add(state_array(parameter, state), chunk.chunk, tensor, shape if state.per_element else ())

    def finish(self) -> dict[ChunkedArray, list[int]]:
        """Waits until every chunk file is on the disk. Returns the chunks written of each array.

        Raises ValueError if a chunk of this shard was not added, OSError if a write failed.
        """
        self._flush_small()
        while self._running:
            self._running.popleft().result()
        if self._missing:
            parameter, chunk = min(self._missing)
            raise ValueError(
                f"{len(self._missing)} chunks of shard {self._header.shard}/{self._header.num_shards} were "
                f"not given, the first is chunk {chunk} of {self._header.manifest[parameter].name!r}"
            )
        return self._written

    def _add(self, array: ChunkedArray, chunk: int, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
        if tensor.shape != shape or tensor.dtype != array.dtype:
            raise ValueError(
                f"chunk {chunk} of {array.path} has shape {tuple(tensor.shape)} and {tensor.dtype}, "
                f"expected {shape} and {array.dtype}"
            )
        self._written[array].append(chunk)
        tensor = tensor.detach()
        file = (array.chunk_key(chunk), tensor, array.chunk_bytes)
        whole = tensor.nbytes == array.chunk_bytes and tensor.is_contiguous() and tensor.device.type == "cpu"
        if whole and tensor.nbytes >= DIRECT_BYTES:
            self._submit([file])
            return
        self._small.append(file)
        self._small_bytes += array.chunk_bytes
        if self._small_bytes >= DIRECT_BYTES or len(self._small) >= TOGETHER:
            self._flush_small()

    def _flush_small(self) -> None:
        if self._small:
            self._submit(self._small)
        self._small, self._small_bytes = [], 0

    def _submit(self, files: list[_File]) -> None:
        while len(self._running) >= IN_FLIGHT:
            self._running.popleft().result()
        self._running.append(self._executor.submit(self._write, files))

    def _write(self, files: list[_File]) -> None:
        spans, offset = [], 0
        for key, _, file_bytes in files:
            spans.append(Span(key, file_bytes, offset, file_bytes))
            offset += _aligned(file_bytes)
        if len(files) == 1 and files[0][1].nbytes == offset and files[0][1].is_contiguous():
            buffer = files[0][1].reshape(-1).view(torch.uint8)
        else:
            # Zeroed, since the last chunk of an array is padded to the length of the others.
            buffer = torch.zeros(offset, dtype=torch.uint8)
            for (_, tensor, _), span in zip(files, spans, strict=True):
                place = buffer[span.offset : span.offset + tensor.nbytes]
                place.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        self._files.write(spans, buffer)
        for span in spans:
            durable.sync(self._folder / span.key)


def _aligned(size: int) -> int:
    """`size` rounded up, so that what follows can be viewed in any dtype."""
    return -(-size // 64) * 64
