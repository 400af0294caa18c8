"""From memory to generations on disk and back."""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from protos import MAX_METADATA_BYTES
from ps.chunk import Chunk
from ps.errors import InvalidRequest, NotFound, StorageFailed
from ps.flush import Flush
from ps.home import IN_MEMORY
from ps.monitor import Monitor
from ps.optimizer import ChunkOptimizer
from ps.options import ServerOptions
from ps.shard import Shard
from ps.store import (
    ChunkFile,
    ChunkState,
    ChunkValue,
    CommitKey,
    GenerationHeader,
    GenerationMissingError,
    JobStore,
    OptimizerSpec,
    StateArray,
    StoreError,
    Written,
    read_tensor,
)
from ps.tier import Area, Part, Tier

SAVED_TOGETHER = 16
"""Chunks that are written to their spill files at a time before a commit links to these."""


class Generations:
    """The committed steps of one job on this server. One thread at a time may load or write."""

    def __init__(self, job: str, options: ServerOptions, store: JobStore) -> None:
        self._job = job
        self._index = options.index
        self._num_shards = options.num_shards
        self._store = store
        self._keep = options.keep
        self._codecs = dict(options.codecs)

    def steps(self) -> list[int]:
        """Ascending. Raises StorageFailed."""
        with _storage_errors():
            return self._store.committed_steps()

    def committed(self) -> list[CommitKey]:
        """See `JobStore.committed`. Raises StorageFailed."""
        with _storage_errors():
            return self._store.committed()

    def tags(self) -> dict[str, int]:
        """The step of each tagged commit. Raises StorageFailed."""
        with _storage_errors():
            return {tag: key.step for tag, key in self._store.tags().items()}

    def tag(self, key: CommitKey, tag: str) -> None:
        """Keeps a generation; see `JobStore.tags`. Raises NotFound and StorageFailed."""
        with _storage_errors():
            self._store.tag(key, tag)

    def empty_shard(self, key: CommitKey, tier: Tier = IN_MEMORY, areas: Sequence[Area] = ()) -> Shard:
        """The shard of a generation before its chunks are read. Raises NotFound and StorageFailed."""
        with _storage_errors():
            header = self._store.read_header(key.step, key.commit_id)
        shard = Shard(self._index, self._num_shards, header.manifest, key.step, tier, areas)
        shard.spec = header.optimizer
        shard.metadata = header.metadata
        shard.generation = key
        return shard

    def read_into(self, shard: Shard, key: CommitKey) -> None:
        """Fills the chunks of a shard that `empty_shard` made. Raises StorageFailed."""
        with _storage_errors():
            if shard.tier.limited:
                arrays = self._arrays(shard, shard.spec)
                for files in self._store.chunk_files(key.step, key.commit_id):
                    self._find(shard, files, arrays)
            else:
                for state in self._store.read_chunks(key.step, key.commit_id):
                    chunk = shard.find(state.parameter, state.chunk)
                    chunk.weight.hold(state.weight)
                    for name, value in state.state.items():
                        chunk.state_part(name, value.dtype, scalar=value.shape != chunk.shape).hold(value)
            self._note_files(shard, key)
        shard.check_weights()

    @staticmethod
    def _find(shard: Shard, files: ChunkState[ChunkFile], arrays: Mapping[str, StateArray]) -> None:
        """Has a chunk read from a generation's files what it needs, when it does."""
        chunk = shard.find(files.parameter, files.chunk)
        parts = [(chunk.weight, files.weight)]
        for name, file in files.state.items():
            array = arrays[name]
            dtype = chunk.dtype if array.dtype is None else array.dtype
            parts.append((chunk.state_part(name, dtype, scalar=not array.per_element), file))
        for part, file in parts:
            if part.spillable and file.encoding is None:
                shard.tier.found(part, file)
            elif part.spillable:
                # What is compressed cannot be read in place.
                with shard.tier.lease(fresh=[part], scratch_bytes=2 * part.size):
                    part.hold(read_tensor(file, part.shape, part.dtype))
            else:
                part.hold(read_tensor(file, part.shape, part.dtype))

    def snapshot(self, shard: Shard, key: CommitKey, metadata: str, monitor: Monitor) -> "Snapshot":
        """What a generation of this shard, which is at rest, is made of. Its chunks follow one by one."""
        spec = shard.stated_optimizer()
        state_codec = self._codecs.get("state")
        arrays = {name: replace(array, codec=state_codec) for name, array in self._arrays(shard, spec).items()}
        manifest = tuple(
            replace(p, codec=self._codecs.get("weight" if p.kind == "parameter" else "buffer")) for p in shard.manifest
        )
        header = GenerationHeader(self._job, key, self._index, self._num_shards, manifest, spec, metadata)
        return Snapshot(shard, header, arrays, Flush(f"the commit of step {key.step}", key.step, shard, monitor))

    def write(self, snapshot: "Snapshot", tag: str = "") -> Written:
        """Writes a generation. Each chunk may change as soon as the snapshot's flush no longer holds it.

        Deletes generations of later steps then: they are of a run that was abandoned. Raises StorageFailed;
        earlier generations are as they were then.
        """
        shard, flush, key = snapshot.shard, snapshot.flush, snapshot.header.key
        stamps: dict[Chunk, int] = {}

        def values() -> Iterator[ChunkState[ChunkValue]]:
            for chunks in _together(flush, SAVED_TOGETHER if shard.tier.limited else 1):
                # Where memory is limited everything goes to its spill file, and the generation links to that:
                # what is there already is not even read.
                unknown = [chunk for chunk in chunks if not _has_files(chunk)]
                shard.tier.save(part for chunk in unknown for part in (chunk.weight, *chunk.state.values()))
                for chunk in chunks:
                    stamps[chunk] = chunk.stamp
                    yield _values(chunk, snapshot.arrays, flush.awaits(chunk))

        def taken(state: ChunkState[ChunkValue]) -> None:
            flush.taken(shard.find(state.parameter, state.chunk))

        with _storage_errors():
            written = self._store.write(snapshot.header, values(), snapshot.arrays, taken, tag=tag)
            self._note_files(shard, key, stamps)
            # Only now, since until the new generation was there a crash could still have gone back to them.
            self._store.discard_after(key.step)
        return written

    def prune(self, complete: CommitKey, current: CommitKey) -> None:
        """Deletes what a commit that every server has makes superfluous, but not `current`. Raises StorageFailed."""
        with _storage_errors():
            self._store.prune(keep=self._keep, complete=complete, current=current)

    def path(self, key: CommitKey) -> Path:
        """Where a generation is. Raises NotFound and StorageFailed."""
        with _storage_errors():
            return self._store.path(key)

    @staticmethod
    def _arrays(shard: Shard, spec: OptimizerSpec | None) -> Mapping[str, StateArray]:
        if shard.optimizer is not None:
            return shard.optimizer.arrays
        return {} if spec is None else ChunkOptimizer(spec, len(shard.manifest)).arrays

    def _note_files(self, shard: Shard, key: CommitKey, stamps: Mapping[Chunk, int] | None = None) -> None:
        """Has the next generation link to this one's files, for chunks that do not change until then.

        stamps: of each chunk when it was written; None where none has changed since.
        """
        for files in self._store.chunk_files(key.step, key.commit_id):
            chunk = shard.find(files.parameter, files.chunk)
            with chunk.lock:
                if stamps is None or chunk.stamp == stamps[chunk]:
                    chunk.stored = files


@dataclass(frozen=True)
class Snapshot:
    """A shard as it was at an instant, of which chunks that change since then are written first."""

    shard: Shard
    header: GenerationHeader
    arrays: Mapping[str, StateArray]
    flush: Flush


def _together(chunks: Iterable[Chunk], most: int) -> Iterator[list[Chunk]]:
    remaining = iter(chunks)
    while batch := list(itertools.islice(remaining, most)):
        yield batch


def _has_files(chunk: Chunk) -> bool:
    """Whether files of an earlier generation have all of the chunk, and are still there."""
    files = chunk.stored
    return files is not None and all(file.path.exists() for file in (files.weight, *files.state.values()))


def _values(chunk: Chunk, arrays: Mapping[str, StateArray], awaited: bool) -> ChunkState[ChunkValue]:
    """What a chunk is written from: files that are right, of an earlier generation or spilled, else memory."""
    stored = chunk.stored

    def value(part: Part, file: ChunkFile | None) -> ChunkValue:
        if file is not None and file.path.exists():
            return file
        return part.file or part.tensor

    weight = value(chunk.weight, stored.weight if stored else None)
    # What options of long ago left behind (momentum that was switched off) is not described.
    state = {
        name: value(part, stored.state.get(name) if stored else None)
        for name, part in chunk.state.items()
        if name in arrays and part.filled
    }
    return ChunkState(chunk.parameter, chunk.index, weight, state, awaited)


@contextmanager
def _storage_errors() -> Iterator[None]:
    """Turns the store's errors into the server's."""
    try:
        yield
    except GenerationMissingError as error:
        raise NotFound(str(error)) from error
    except StoreError as error:
        raise StorageFailed(str(error)) from error


def check_metadata(metadata: str) -> None:
    """Raises InvalidRequest unless this is empty or a JSON object of at most MAX_METADATA_BYTES."""
    if len(metadata.encode()) > MAX_METADATA_BYTES:
        raise InvalidRequest(f"a commit's metadata may have {MAX_METADATA_BYTES} bytes")
    if metadata:
        try:
            is_object = isinstance(json.loads(metadata), dict)
        except (ValueError, RecursionError):
            is_object = False
        if not is_object:
            raise InvalidRequest("a commit's metadata has to be a JSON object")
