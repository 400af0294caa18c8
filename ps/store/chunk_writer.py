"""Writes chunks while they are being handed over: many files in flight, synced behind."""

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from protos.layout import ChunkGrid
from ps.store import checksum, direct, durable
from ps.store.arrays import ChunkedArray, state_array, value_array
from ps.store.chunk_file import read_file
from ps.store.chunk_files import ChunkFiles, Span
from ps.store.contents import ChunkFile, ChunkState, ChunkValue, GenerationHeader, StateArray
from ps.store.disks import spread
from ps.store.errors import DamagedError

IN_FLIGHT = 16
"""Write calls begun and not finished. More keep no more cores busy and hold more chunks."""

LARGE_BYTES = 1 << 20
"""A tensor of at least this size is written from where it is, in a call of its own. Smaller ones are
copied together first: a call costs half a millisecond, however little it writes."""

TOGETHER = 32
"""The most small tensors of one call: each is a file, and a call's files are synced one after another."""


class _Handover:
    """Counts down the parts of a chunk that still have to be where they are."""

    def __init__(self, taken: Callable[[], None]) -> None:
        self._taken = taken
        self._lock = threading.Lock()
        self._parts = 1

    def expect(self) -> None:
        with self._lock:
            self._parts += 1

    def done(self) -> None:
        with self._lock:
            self._parts -= 1
            last = self._parts == 0
        if last:
            self._taken()


class _Disk:
    """What goes to one folder.

    small: tensors that wait to be written in one call. written: by array and chunk, the CRC32C.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = ChunkFiles(folder)
        self.small: list[tuple[ChunkedArray, int, torch.Tensor]] = []
        self.small_bytes = 0
        self.written: dict[ChunkedArray, dict[int, int]] = defaultdict(dict)


class ChunkWriter:
    """Writes the chunks of one generation into folders, one on each disk. Used by one thread.

    writers, syncers: run what writes bytes, and what waits until they are on the disk.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        header: GenerationHeader,
        states: Mapping[str, StateArray],
        writers: Executor,
        syncers: Executor,
    ) -> None:
        self._header = header
        self._states = states
        self._writers = writers
        self._syncers = syncers
        self._disks = [_Disk(folder) for folder in folders]
        shapes = [parameter.shape for parameter in header.manifest]
        # The disk of each chunk that is still to come.
        self._missing = dict(spread(shapes, header.shard, header.num_shards, len(folders)))
        self._writing: deque[Future[None]] = deque()
        self._syncing: deque[Future[None]] = deque()
        self._scratch = direct.Scratch()
        self._bytes_lock = threading.Lock()
        self.bytes_written = 0

    def add(self, chunk: ChunkState[ChunkValue], taken: Callable[[], None] = lambda: None) -> None:
        """Takes one chunk. Its tensors must not change, nor its files go, until `taken` was called.

        taken: called from any thread once the chunk's bytes are copied: to the page cache if it is awaited, else to
            memory from which they go straight to the disk. The former is sooner, if a disk is slow or much is to
            be written; the latter takes a third of the processor's time.

        Raises ValueError for a chunk that is not this shard's, was added before, or does not have the shapes
        and dtypes that header and state arrays state; OSError if a write fails; DamagedError for a file that
        is not there or cannot be a chunk's.
        """
        header = self._header
        place = (chunk.parameter, chunk.chunk)
        if place not in self._missing:
            raise ValueError(
                f"chunk {chunk.chunk} of parameter {chunk.parameter} is not one of shard "
                f"{header.shard}/{header.num_shards}, or came twice"
            )
        disk = self._disks[self._missing.pop(place)]
        parameter = header.manifest[chunk.parameter]
        shape = ChunkGrid.of(parameter.shape).chunk_shape(chunk.chunk)
        handover = _Handover(taken)
        self._add(disk, value_array(parameter), chunk.chunk, chunk.weight, shape, handover, chunk.awaited)
        if chunk.state and not parameter.has_state:
            raise ValueError(f"{parameter.name!r} is not trained and cannot have optimizer state")
        for name, value in chunk.state.items():
            if name not in self._states:
                raise ValueError(f"state {name!r} of {parameter.name!r} is not among {sorted(self._states)}")
            state = self._states[name]
            array = state_array(parameter, state)
            self._add(disk, array, chunk.chunk, value, shape if state.per_element else (), handover, chunk.awaited)
        handover.done()

    def finish(self) -> list[Mapping[ChunkedArray, Mapping[int, int]]]:
        """Waits until every chunk file is on its disk. Returns each array's chunks, with their files' CRC32C, by disk.

        Raises ValueError if a chunk of this shard was not added, OSError if a write failed.
        """
        for disk in self._disks:
            self._flush_small(disk)
        for running in (self._writing, self._syncing):
            while running:
                running.popleft().result()
        if self._missing:
            parameter, chunk = min(self._missing)
            raise ValueError(
                f"{len(self._missing)} chunks of shard {self._header.shard}/{self._header.num_shards} were "
                f"not given, the first is chunk {chunk} of {self._header.manifest[parameter].name!r}"
            )
        return [disk.written for disk in self._disks]

    def _add(
        self,
        disk: _Disk,
        array: ChunkedArray,
        chunk: int,
        value: ChunkValue,
        shape: tuple[int, ...],
        handover: _Handover,
        awaited: bool,
    ) -> None:
        if isinstance(value, ChunkFile):
            handover.expect()
            self._submit(self._link, disk, array, chunk, value, handover)
            return
        if value.shape != shape or value.dtype != array.dtype:
            raise ValueError(
                f"chunk {chunk} of {array.path} has shape {tuple(value.shape)} and {value.dtype}, "
                f"expected {shape} and {array.dtype}"
            )
        tensor = value.detach()
        if array.encoding is not None:
            handover.expect()
            self._submit(self._write_encoded, disk, array, chunk, tensor, handover)
            return
        whole = tensor.nbytes == array.chunk_bytes and tensor.is_contiguous() and tensor.device.type == "cpu"
        if whole and tensor.nbytes >= LARGE_BYTES:
            handover.expect()
            self._submit(self._write_large, disk, array, chunk, tensor, handover, awaited)
            return
        # Zeroed, since the last chunk of an array is padded to the length of the others; and up to where the
        # next one can be viewed in any dtype.
        padded = torch.zeros(-(-array.chunk_bytes // 64) * 64, dtype=torch.uint8)
        padded[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        disk.small.append((array, chunk, padded))
        disk.small_bytes += array.chunk_bytes
        if disk.small_bytes >= LARGE_BYTES or len(disk.small) >= TOGETHER:
            self._flush_small(disk)

    def _flush_small(self, disk: _Disk) -> None:
        if disk.small:
            self._submit(self._write_together, disk, disk.small)
        disk.small, disk.small_bytes = [], 0

    def _submit(self, task: Callable[..., None], *arguments: object) -> None:
        while len(self._writing) >= IN_FLIGHT:
            self._writing.popleft().result()
        while self._syncing and self._syncing[0].done():
            self._syncing.popleft().result()
        self._writing.append(self._writers.submit(task, *arguments))

    def _write_large(
        self,
        disk: _Disk,
        array: ChunkedArray,
        chunk: int,
        tensor: torch.Tensor,
        handover: _Handover,
        awaited: bool,
    ) -> None:
        key = array.chunk_key(chunk)
        data = tensor.reshape(-1).view(torch.uint8)
        if awaited:
            disk.files.write([Span(key, array.chunk_bytes, 0, array.chunk_bytes)], data)
            disk.written[array][chunk] = checksum.crc32c(data)
            handover.done()
        else:
            copied = self._scratch.bytes(len(data))
            copied[: len(data)].copy_(data)
            handover.done()
            disk.written[array][chunk] = checksum.crc32c(copied[: len(data)])
            file = disk.folder / key
            file.parent.mkdir(mode=durable.FOLDER_MODE, parents=True, exist_ok=True)
            direct.write_file(str(file), copied.numpy().data, len(data), len(data))
        self._wrote(disk, [key], array.chunk_bytes)

    def _write_together(self, disk: _Disk, files: list[tuple[ChunkedArray, int, torch.Tensor]]) -> None:
        spans, offset = [], 0
        for array, chunk, padded in files:
            spans.append(Span(array.chunk_key(chunk), array.chunk_bytes, offset, array.chunk_bytes))
            offset += len(padded)
        disk.files.write(spans, files[0][2] if len(files) == 1 else torch.cat([padded for _, _, padded in files]))
        for array, chunk, padded in files:
            disk.written[array][chunk] = checksum.crc32c(padded[: array.chunk_bytes])
        self._wrote(disk, [span.key for span in spans], sum(span.size for span in spans))

    def _write_encoded(
        self, disk: _Disk, array: ChunkedArray, chunk: int, tensor: torch.Tensor, handover: _Handover
    ) -> None:
        padded = np.zeros(array.chunk_bytes, dtype=np.uint8)
        torch.from_numpy(padded)[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        handover.done()
        self._write_bytes(disk, array, chunk, padded)

    def _write_bytes(self, disk: _Disk, array: ChunkedArray, chunk: int, decoded: npt.NDArray[np.uint8]) -> None:
        """Writes a chunk's bytes, padding included, as the array has them: compressed or not."""
        key = array.chunk_key(chunk)
        data = decoded if array.encoding is None else np.frombuffer(array.encoding.encode(decoded), dtype=np.uint8)
        file = disk.folder / key
        file.parent.mkdir(mode=durable.FOLDER_MODE, parents=True, exist_ok=True)
        file.write_bytes(data.data)
        disk.written[array][chunk] = checksum.extend(0, data)
        self._wrote(disk, [key], len(data))

    def _link(self, disk: _Disk, array: ChunkedArray, chunk: int, file: ChunkFile, handover: _Handover) -> None:
        """Gives a file a second name, so that nothing of it is read or written; where that cannot be, copies it.

        One that is compressed in another way than the array is written anew.
        """
        if file.encoding != array.encoding:
            decoded = read_file(file)
            handover.done()
            self._write_bytes(disk, array, chunk, decoded)
            return
        key = array.chunk_key(chunk)
        target = disk.folder / key
        target.parent.mkdir(mode=durable.FOLDER_MODE, parents=True, exist_ok=True)
        try:
            linked = durable.link_or_copy(file.path, target)
        except FileNotFoundError as error:
            raise DamagedError(f"{file.path}, which holds chunk {chunk} of {array.path}, is gone") from error
        if not linked:
            self._count(array.chunk_bytes)
        size = target.stat().st_size
        if array.encoding is None and size != array.chunk_bytes:
            raise DamagedError(f"{file.path} has {size} bytes, and chunk {chunk} of {array.path} {array.chunk_bytes}")
        disk.written[array][chunk] = _checksum(file) if file.crc32c is None else file.crc32c
        handover.done()
        if not (linked and file.synced):
            self._sync(disk, [key])

    def _wrote(self, disk: _Disk, keys: list[str], size: int) -> None:
        self._count(size)
        self._sync(disk, keys)

    def _count(self, size: int) -> None:
        with self._bytes_lock:
            self.bytes_written += size

    def _sync(self, disk: _Disk, keys: list[str]) -> None:
        self._syncing.append(self._syncers.submit(_sync_files, disk.folder, keys))


def _checksum(file: ChunkFile) -> int:
    try:
        return checksum.of_file(file.path)
    except OSError as error:
        raise DamagedError(
            f"cannot read {file.path}: {error.strerror or error}; what was committed before is untouched: check that "
            "the disk is healthy, and start the trainers again, which go on from there"
        ) from error


def _sync_files(folder: Path, keys: list[str]) -> None:
    for key in keys:
        durable.sync(folder / key)
