"""The generations of one job on one server."""

import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from protos.names import check_job_name
from ps.store import attributes, durable, shard_file
from ps.store.arrays import METADATA_FILE, all_arrays, check_names, group_metadata
from ps.store.chunk_reader import ChunkReader
from ps.store.chunk_writer import ChunkWriter
from ps.store.contents import ChunkState, GenerationHeader, StateArray, Written
from ps.store.errors import GenerationMissingError, StoreError, disk_errors
from ps.store.fields import Fields

GENERATIONS = "generations"
"""The folder in a job's folder that holds its generations."""

WRITE_THREADS = 16
"""Threads that write and sync. They mostly wait for the disk, and 16 beat 8 and 4."""

_STEP = re.compile(r"[0-9]{8,18}")


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

    def committed_steps(self) -> list[int]:
        """The steps of all complete generations, ascending."""
        name = shard_file.file_name(self._shard, self._num_shards)
        return sorted(int(folder.name) for folder in self._folders() if _is_step(folder) and (folder / name).is_file())

    def read_header(self, step: int) -> GenerationHeader:
        """Raises GenerationMissingError, DamagedError or NewerFormatError."""
        return self._read_header(step)[0]

    def read_chunks(self, step: int) -> Iterator[ChunkState]:
        """This shard's chunks in the order of the manifest, read ahead in batches of about 16 MiB.

        Tensors are on the CPU, contiguous, and the caller's. Small chunks of one batch share an
        allocation. Raises as `read_header` does, at once or while iterating.
        """
        header, states = self._read_header(step)
        folder, remedy = self._path(step), self._remedy(step)
        held = shard_file.read(folder, step, self._shard, self._num_shards, remedy)
        return iter(ChunkReader(folder, header, states, held, remedy))

    def write(
        self,
        header: GenerationHeader,
        chunks: Iterable[ChunkState],
        state_arrays: Mapping[str, StateArray],
    ) -> Written:
        """Writes a generation: when this returns, it survives the loss of power.

        chunks: all chunks of this shard, in any order, taken one by one. Their tensors must not change
            until this returns: large ones are written without a copy.
        state_arrays: what the optimizer class keeps, by name, the same on every server.

        A generation of this step that exists already is left as it is. Raises DiskFullError and other
        StoreErrors if it cannot be written, and ValueError if header and chunks do not fit each other or
        this store; what was written then is removed, and earlier generations are untouched.
        """
        self._check(header, state_arrays)
        path = self._path(header.step)
        if header.step in self.committed_steps():
            return Written(path, 0)
        with disk_errors(f"write generation {header.step} of job {self._job!r}", self._folder):
            durable.make_folders(self._folder)
            if path.exists():
                raise StoreError(
                    f"cannot write generation {header.step} of job {self._job!r}: {path} exists and is not "
                    f"one of shard {self._shard}/{self._num_shards}; move it away and try again"
                )
            temporary = durable.temporary_name(path)
            try:
                temporary.mkdir(mode=durable.FOLDER_MODE)
                written_bytes = self._write_into(temporary, header, chunks, dict(state_arrays))
                temporary.rename(path)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            durable.sync(self._folder)
        return Written(path, written_bytes)

    def prune(self, *, keep: int, complete_step: int) -> list[int]:
        """Deletes generations older than `complete_step`, except those among the `keep` newest.

        complete_step: a step whose generation every server is known to have. If this server has none,
            nothing is deleted.
        Returns the steps of the deleted generations.
        """
        steps = self.committed_steps()
        if complete_step not in steps:
            return []
        kept = set(steps[-keep:]) if keep > 0 else set()
        return self._delete(step for step in steps if step < complete_step and step not in kept)

    def discard_after(self, step: int) -> list[int]:
        """Deletes generations newer than `step`, newest first, and returns their steps.

        For a job that resumes from `step`: newer generations are of a run that is being abandoned. Left
        where they are, they would pass for the new run's own once it gets to their steps.
        """
        return self._delete(s for s in reversed(self.committed_steps()) if s > step)

    def clean(self) -> None:
        """Removes what interrupted writes and deletions left behind. For the start of a server."""
        with disk_errors(f"clean up job {self._job!r}", self._folder):
            for folder in self._folders():
                if durable.is_temporary(folder.name):
                    shutil.rmtree(folder)

    def _write_into(
        self,
        folder: Path,
        header: GenerationHeader,
        chunks: Iterable[ChunkState],
        states: dict[str, StateArray],
    ) -> int:
        executor = ThreadPoolExecutor(WRITE_THREADS, thread_name_prefix="store-write")
        try:
            durable.write_files(_metadata_files(folder, header, states), executor)
            writer = ChunkWriter(folder, header, states, executor)
            for chunk in chunks:
                writer.add(chunk)
            written = writer.finish()
            own = folder / shard_file.file_name(self._shard, self._num_shards)
            durable.write_file(own, shard_file.encode(header.step, self._shard, self._num_shards, written))
            durable.sync_folders(folder, executor)
        finally:
            # Waits for what is running: nothing may write into a folder that is being removed.
            executor.shutdown(cancel_futures=True)
        return sum(array.chunk_bytes * len(chunks) for array, chunks in written.items())

    def _read_header(self, step: int) -> tuple[GenerationHeader, dict[str, StateArray]]:
        if step not in (steps := self.committed_steps()):
            raise GenerationMissingError(
                f"job {self._job!r} has no generation of step {step} in {self._folder}; "
                + (f"it has {', '.join(map(str, steps))}" if steps else "it has none")
            )
        document = Fields.of_file(self._path(step) / METADATA_FILE, self._remedy(step))
        header, states = attributes.decode(document, self._shard)
        for name, found, expected in (
            ("step", header.step, step),
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
        if header.step < 0 or any(name != state.name for name, state in states.items()):
            raise ValueError(f"step {header.step} is negative, or a state array is not under its own name")
        check_names(header.manifest, list(states))

    def _delete(self, steps: Iterable[int]) -> list[int]:
        deleted = []
        with disk_errors(f"delete generations of job {self._job!r}", self._folder):
            for step in steps:
                durable.remove_folder(self._path(step))
                deleted.append(step)
        return deleted

    def _path(self, step: int) -> Path:
        return self._folder / f"{step:08d}"

    def _folders(self) -> list[Path]:
        return [p for p in self._folder.iterdir() if p.is_dir()] if self._folder.is_dir() else []

    def _remedy(self, step: int) -> str:
        others = [str(s) for s in self.committed_steps() if s != step]
        restore = f"restore another generation ({', '.join(others)}) or " if others else ""
        return f"{restore}put the file back from a copy of {self._path(step)}"


def _is_step(folder: Path) -> bool:
    return bool(_STEP.fullmatch(folder.name)) and f"{int(folder.name):08d}" == folder.name


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
