"""From memory to generations on disk and back."""

import json
from collections.abc import Mapping

import torch

from protos import MAX_METADATA_BYTES
from ps.chunk import Chunk
from ps.errors import InvalidRequest, NotFound, StorageFailed
from ps.optimizer import ChunkOptimizer
from ps.shard import Shard
from ps.store import (
    ChunkState,
    GenerationHeader,
    GenerationMissingError,
    JobStore,
    StateArray,
    StoreError,
    Written,
)


class Generations:
    """The committed steps of one job on this server. One thread at a time may load or write."""

    def __init__(self, job: str, index: int, num_shards: int, store: JobStore, keep: int) -> None:
        self._job = job
        self._index = index
        self._num_shards = num_shards
        self._store = store
        self._keep = keep

    def steps(self) -> list[int]:
        """Ascending. Raises StorageFailed."""
        try:
            return self._store.committed_steps()
        except StoreError as error:
            raise StorageFailed(str(error)) from error

    def empty_shard(self, step: int) -> Shard:
        """The shard of a generation before its chunks are read. Raises NotFound and StorageFailed."""
        try:
            header = self._store.read_header(step)
        except GenerationMissingError as error:
            raise NotFound(str(error)) from error
        except StoreError as error:
            raise StorageFailed(str(error)) from error
        shard = Shard(self._index, self._num_shards, header.manifest, step)
        shard.spec = header.optimizer
        shard.metadata = header.metadata
        shard.generation = step
        return shard

    def read_into(self, shard: Shard, step: int) -> None:
        """Fills the chunks of a shard that `empty_shard` made. Raises StorageFailed."""
        try:
            for state in self._store.read_chunks(step):
                chunk = shard.find(state.parameter, state.chunk)
                chunk.write(state.weight, adopt=True)
                chunk.state = dict(state.state)
        except StoreError as error:
            raise StorageFailed(str(error)) from error
        shard.check_weights()

    def write(self, shard: Shard, step: int, metadata: str, complete_step: int) -> Written:
        """Writes a shard that is at rest at `step`, and deletes what is not kept. Raises StorageFailed.

        A generation that the shard has not changed since it was written or read is left as it is, with
        its metadata.
        complete_step: a step that every server is known to have committed.
        """
        try:
            if shard.generation != step:
                # What is there from here on is of a run that was abandoned for an earlier step.
                self._store.discard_after(step - 1)
                shard.metadata = metadata
            written = self._write(shard, step, shard.metadata)
            shard.generation = step
            self._store.prune(keep=self._keep, complete_step=complete_step)
        except StoreError as error:
            raise StorageFailed(str(error)) from error
        return written

    def _write(self, shard: Shard, step: int, metadata: str) -> Written:
        spec = shard.stated_optimizer()
        arrays: Mapping[str, StateArray] = {}
        if shard.optimizer is not None:
            arrays = shard.optimizer.arrays
        elif spec is not None:
            arrays = ChunkOptimizer(spec, len(shard.manifest)).arrays
        header = GenerationHeader(self._job, step, self._index, self._num_shards, shard.manifest, spec, metadata)

        def kept(chunk: Chunk) -> dict[str, torch.Tensor]:
            # What options of long ago left behind (momentum that was switched off) is not described.
            return {name: value for name, value in chunk.state.items() if name in arrays}

        chunks = (
            ChunkState(chunk.parameter, chunk.index, chunk.weight, kept(chunk))
            for chunk in shard
            if chunk.weight is not None
        )
        return self._store.write(header, chunks, arrays)


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
