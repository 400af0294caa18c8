"""The generations of one job on one server."""

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from protos.names import check_id, check_job_name
from ps.store import attributes, durable, generation_folders, shard_file
from ps.store.arrays import METADATA_FILE, all_arrays, check_names, group_metadata
from ps.store.chunk_reader import ChunkReader
from ps.store.chunk_writer import ChunkWriter
from ps.store.contents import ChunkFile, ChunkState, ChunkValue, CommitKey, GenerationHeader, StateArray, Written
from ps.store.errors import GenerationMissingError, StoreError, disk_errors
from ps.store.fields import Fields
from ps.store.generation_folders import GenerationFolder

GENERATIONS = "generations"
"""The folder in a job's folder that holds its generations."""

WORKING = "working"
"""The folder in a job's folder for what a running server cannot hold in memory."""

WRITE_THREADS = 4
"""Threads that write chunks. They copy bytes to the operating system."""

SYNC_THREADS = 16
"""Threads that sync. They wait for the disk, and 16 beat 8 and 4."""

_log = logging.getLogger(__name__)


class JobStore:
    """Reads and writes the generations of `job` that belong to shard `shard` of `num_shards`.

    A generation is a folder that is complete or does not exist under its name. One thread at a time may
    write, prune or clean; reading may go on beside it. Errors are StoreErrors unless stated.
    """

    def __init__(self, data_dir: Path, job: str, shard: int, num_shards: int) -> None:
        check_job_name(job)
        self._job = job
        self._shard = shard
        self._num_shards = num_shards
        self._folder = Path(data_dir) / job / GENERATIONS
        self.working = Path(data_dir) / job / WORKING
        self._own_file = shard_file.file_name(shard, num_shards)

    def committed_steps(self) -> list[int]:
        """The steps of all complete generations, ascending."""
        return sorted({generation.step for generation in self._generations()})

    def committed(self) -> list[CommitKey]:
        """All complete generations by step; of one step in the order in which they were written.

        The commit_id is "" where it cannot be read, which is logged.
        """
        while True:
            generations = self._generations()
            keys = [self._key(generation) for generation in generations]
            # A commit that goes on meanwhile renames folders.
            if generations == self._generations():
                return keys

    def path(self, key: CommitKey) -> Path:
        """Where a generation is. Raises GenerationMissingError."""
        return self._find(key.step, key.commit_id).path

    def read_header(self, step: int, commit_id: str | None = None) -> GenerationHeader:
        """Of the step's newest generation unless `commit_id` says of which.

        Raises GenerationMissingError, DamagedError or NewerFormatError.
        """
        return self._read_header(self._find(step, commit_id))[0]

    def read_chunks(self, step: int, commit_id: str | None = None) -> Iterator[ChunkState[torch.Tensor]]:
        """This shard's chunks in the order of the manifest, read ahead in batches of about 16 MiB.

        Every file's checksum is compared, if the generation has checksums.

        Tensors are on the CPU, contiguous, and the caller's. Small chunks of one batch share an
        allocation. Raises as `read_header` does, at once or while iterating.
        """
        return iter(self._reader(step, commit_id))

    def chunk_files(self, step: int, commit_id: str | None = None) -> Iterator[ChunkState[ChunkFile]]:
        """The files of this shard's chunks in the order of the manifest, for a later generation to link to.

        They stay where they are until the generation is pruned or replaced. Raises as `read_header` does.
        """
        return self._reader(step, commit_id).files()

    def write(
        self,
        header: GenerationHeader,
        chunks: Iterable[ChunkState[ChunkValue]],
        state_arrays: Mapping[str, StateArray],
        taken: Callable[[ChunkState[ChunkValue]], None] = lambda chunk: None,
    ) -> Written:
        """Writes a generation: when this returns, it survives the loss of power.

        chunks: all chunks of this shard, in any order, taken one by one. What comes as a file is linked to
            where the disk allows, else copied.
        taken: called from any thread with each chunk whose tensors may change, and whose files may go, from
            then on. Until then they must not: large tensors are written without a copy.
        state_arrays: what the optimizer class keeps, by name, the same on every server.

        A generation of this commit that exists already is left as it is. One of another commit of this
        step is replaced: it stays readable by its commit_id until `prune` deletes it. At any instant a
        crash leaves the old generation, the new one, or both.

        Raises DiskFullError and other StoreErrors if it cannot be written, and ValueError if header and
        chunks do not fit each other or this store; what was written then is removed, and earlier
        generations are untouched.
        """
        self._check(header, state_arrays)
        step = header.key.step
        path = generation_folders.in_place(self._folder, step)
        for generation in self._generations():
            if generation.step == step and self._key(generation) == header.key:
                return Written(header.key, generation.path, 0)
        with disk_errors(f"write generation {step} of job {self._job!r}", self._folder):
            durable.make_folders(self._folder)
            if path.exists() and not (path / self._own_file).is_file():
                raise StoreError(
                    f"cannot write generation {step} of job {self._job!r}: {path} exists and is not "
                    f"one of shard {self._shard}/{self._num_shards}; move it away and try again"
                )
            temporary = durable.temporary_name(path)
            try:
                temporary.mkdir(mode=durable.FOLDER_MODE)
                written_bytes = self._write_into(temporary, header, chunks, dict(state_arrays), taken)
                if path.exists():
                    generation_folders.set_aside(self._folder, step)
                temporary.rename(path)
            except BaseException:
                with suppress(OSError):
                    generation_folders.put_back(self._folder)
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            durable.sync(self._folder)
        return Written(header.key, path, written_bytes)

    def prune(self, *, keep: int, complete: CommitKey, current: CommitKey) -> list[CommitKey]:
        """Deletes what `complete` supersedes: older generations except those of the `keep` newest steps, and
        replaced ones. `complete` itself is put in place if it was replaced.

        complete: a commit that every server is known to have. If this server does not have it, nothing is
            deleted.
        current: the commit that the job in memory is at. It is never deleted.
        Returns the deleted ones.
        """
        generations = self._generations()
        keys = {generation: self._key(generation) for generation in generations}
        if complete not in keys.values():
            return []
        steps = self.committed_steps()
        kept_steps = set(steps[-keep:]) if keep > 0 else set()

        def superseded(generation: GenerationFolder) -> bool:
            if keys[generation] in (complete, current) or generation.step > complete.step:
                return False
            # At the step of `complete`, one that is in place is of a continuation that was abandoned.
            replaced = generation.step == complete.step or generation.number is not None
            return replaced or generation.step not in kept_steps

        doomed = [generation for generation in generations if superseded(generation)]
        self._delete(doomed)
        with disk_errors(f"clean up job {self._job!r}", self._folder):
            generation_folders.put_back(self._folder)
        return [keys[generation] for generation in doomed]

    def discard_after(self, step: int) -> list[int]:
        """Deletes generations newer than `step`, newest first, and returns their steps.

        For a job that went back and committed `step` anew: newer generations are of the run that was
        abandoned. Left where they are, they would be taken for the job's newest.
        """
        newer = [generation for generation in self._generations() if generation.step > step]
        # Of one step the replaced ones first: one that is left alone would be put back in place.
        newer.sort(key=lambda generation: -generation.step)
        self._delete(newer)
        return sorted({generation.step for generation in newer}, reverse=True)

    def clean(self) -> None:
        """Removes what interrupted writes and deletions left behind. For the start of a server."""
        with disk_errors(f"clean up job {self._job!r}", self._folder):
            for folder in self._folder.iterdir() if self._folder.is_dir() else ():
                if folder.is_dir() and durable.is_temporary(folder.name):
                    shutil.rmtree(folder)
            generation_folders.put_back(self._folder)

    def _write_into(
        self,
        folder: Path,
        header: GenerationHeader,
        chunks: Iterable[ChunkState[ChunkValue]],
        states: dict[str, StateArray],
        taken: Callable[[ChunkState[ChunkValue]], None],
    ) -> int:
        writers = ThreadPoolExecutor(WRITE_THREADS, thread_name_prefix="store-write")
        syncers = ThreadPoolExecutor(SYNC_THREADS, thread_name_prefix="store-sync")
        try:
            # Beside the chunks, for which somebody may be waiting.
            metadata = durable.write_files(_metadata_files(folder, header, states), syncers)
            writer = ChunkWriter(folder, header, states, writers, syncers)
            for chunk in chunks:
                writer.add(chunk, partial(taken, chunk))
            written = writer.finish()
            durable.drain(metadata)
            own = shard_file.encode(header.key.step, self._shard, self._num_shards, written)
            durable.write_file(folder / self._own_file, own)
            durable.sync_folders(folder, syncers)
        finally:
            # Waits for what is running: nothing may write into a folder that is being removed.
            writers.shutdown(cancel_futures=True)
            syncers.shutdown(cancel_futures=True)
        return writer.bytes_written

    def _reader(self, step: int, commit_id: str | None) -> ChunkReader:
        generation = self._find(step, commit_id)
        header, states = self._read_header(generation)
        remedy = self._remedy(generation)
        held = shard_file.read(generation.path, step, self._shard, self._num_shards, remedy)
        return ChunkReader(generation.path, header, states, held, remedy)

    def _generations(self) -> list[GenerationFolder]:
        return generation_folders.find(self._folder, self._own_file)

    def _key(self, generation: GenerationFolder) -> CommitKey:
        try:
            document = Fields.of_file(generation.path / METADATA_FILE, self._remedy(generation))
            return CommitKey(generation.step, attributes.decode_key(document).commit_id)
        except StoreError as error:
            _log.warning("%s", error)
            return CommitKey(generation.step, "")

    def _find(self, step: int, commit_id: str | None) -> GenerationFolder:
        for generation in reversed(self._generations()):
            if generation.step == step and commit_id in (None, self._key(generation).commit_id):
                return generation
        steps = self.committed_steps()
        of_commit = "" if commit_id is None else f", commit {commit_id},"
        raise GenerationMissingError(
            f"job {self._job!r} has no generation of step {step}{of_commit} in {self._folder}; "
            + (f"it has {', '.join(map(str, steps))}" if steps else "it has none")
        )

    def _read_header(self, generation: GenerationFolder) -> tuple[GenerationHeader, dict[str, StateArray]]:
        document = Fields.of_file(generation.path / METADATA_FILE, self._remedy(generation))
        header, states = attributes.decode(document, self._shard)
        for name, found, expected in (
            ("step", header.key.step, generation.step),
            ("num_shards", header.num_shards, self._num_shards),
        ):
            if found != expected:
                document.refuse(name, f"is {found}, and the file's place says {expected}")
        return header, states

    def _check(self, header: GenerationHeader, states: Mapping[str, StateArray]) -> None:
        if (header.job, header.shard, header.num_shards) != (self._job, self._shard, self._num_shards):
            raise ValueError(
                f"a generation of shard {header.shard}/{header.num_shards} of job {header.job!r} does not "
                f"belong to the store of shard {self._shard}/{self._num_shards} of job {self._job!r}"
            )
        check_id(header.key.commit_id)
        if header.key.step < 0 or any(name != state.name for name, state in states.items()):
            raise ValueError(f"step {header.key.step} is negative, or a state array is not under its own name")
        check_names(header.manifest, list(states))

    def _delete(self, generations: Iterable[GenerationFolder]) -> None:
        with disk_errors(f"delete generations of job {self._job!r}", self._folder):
            for generation in generations:
                durable.remove_folder(generation.path)

    def _remedy(self, generation: GenerationFolder) -> str:
        others = [str(step) for step in self.committed_steps() if step != generation.step]
        restore = f"restore another generation ({', '.join(others)}) or " if others else ""
        return f"{restore}put the file back from a copy of {generation.path}"


def _metadata_files(
    folder: Path, header: GenerationHeader, states: Mapping[str, StateArray]
) -> Iterator[tuple[Path, bytes]]:
    """The `zarr.json` of the group, of the groups in it, and of every array of the model."""
    yield folder / METADATA_FILE, group_metadata(attributes.encode(header, states))
    groups = set()
    for array in all_arrays(header.manifest, states):
        group = array.path.split("/")[0]
        if group not in groups:
            groups.add(group)
            (folder / group).mkdir(mode=durable.FOLDER_MODE)
            yield folder / group / METADATA_FILE, group_metadata({})
        (folder / array.path).mkdir(mode=durable.FOLDER_MODE)
        yield folder / array.path / METADATA_FILE, array.metadata()
