"""The generations of one job on one server."""

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from protos.names import check_id, check_job_name, check_tag
from ps.store import attributes, durable, generation_folders, shard_file, tags
from ps.store.arrays import METADATA_FILE, all_arrays, check_names, group_metadata
from ps.store.chunk_reader import ChunkReader
from ps.store.chunk_writer import ChunkWriter
from ps.store.contents import ChunkFile, ChunkState, ChunkValue, CommitKey, GenerationHeader, StateArray, Written
from ps.store.disks import marker
from ps.store.errors import DamagedError, GenerationMissingError, StoreError, disk_errors
from ps.store.fields import Fields
from ps.store.generations_on_disks import Generation, GenerationsOnDisks, HalfPlacedError

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

    data_dirs: the server's data folders; with several, each holds a part of every generation.

    A generation is a folder that is complete or does not exist under its name. One thread at a time may
    write, prune or clean; reading may go on beside it. Errors are StoreErrors unless stated.
    """

    def __init__(self, data_dirs: Path | Sequence[Path], job: str, shard: int, num_shards: int) -> None:
        check_job_name(job)
        self.data_dirs = (Path(data_dirs),) if isinstance(data_dirs, Path) else tuple(map(Path, data_dirs))
        self._job = job
        self._shard = shard
        self._num_shards = num_shards
        # Where errors of all disks point to.
        self._folder = self.data_dirs[0] / job / GENERATIONS
        self.working = tuple(data_dir / job / WORKING for data_dir in self.data_dirs)
        self._own_file = shard_file.file_name(shard, num_shards)
        self._disks = GenerationsOnDisks(
            [data_dir / job / GENERATIONS for data_dir in self.data_dirs], shard, num_shards, self._own_file, _key_of
        )

    def committed_steps(self) -> list[int]:
        """The steps of all generations, ascending."""
        return sorted({generation.step for generation in self._disks.find()})

    def committed(self) -> list[CommitKey]:
        """All complete generations by step; of one step in the order in which they were written.

        The commit_id is "" where it cannot be read, or where a part on another disk is missing, which is logged.
        """
        while True:
            generations = self._disks.find()
            keys = [self._key(generation) for generation in generations]
            # A commit that goes on meanwhile renames folders.
            if generations == self._disks.find():
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
        *,
        tag: str = "",
    ) -> Written:
        """Writes a generation: when this returns, it survives the loss of power.

        chunks: all chunks of this shard, in any order, taken one by one. What comes as a file is linked to
            where the disk allows, else copied.
        taken: called from any thread with each chunk whose tensors may change, and whose files may go, from
            then on. Until then they must not: large tensors are written without a copy.
        tag: keeps it whatever `prune` is told; "" for none.
        state_arrays: what the optimizer class keeps, by name, the same on every server.

        A generation of this commit that exists already is left as it is. One of another commit of this
        step is replaced: it stays readable by its commit_id until `prune` deletes it. At any instant a
        crash leaves the old generation, the new one, or both.

        Raises DiskFullError and other StoreErrors if it cannot be written, and ValueError if header and
        chunks do not fit each other or this store; what was written then is removed, and earlier
        generations are untouched.
        """
        self._check(header, state_arrays, tag)
        step = header.key.step
        for generation in self._disks.find():
            if generation.step == step and self._key(generation) == header.key:
                return Written(header.key, generation.path, 0)
        with disk_errors(f"write generation {step} of job {self._job!r}", self._folder):
            temporaries = []
            for folder in self._disks.folders:
                durable.make_folders(folder)
                path = generation_folders.in_place(folder, step)
                if path.exists() and not (path / self._own_file).is_file():
                    raise StoreError(
                        f"cannot write generation {step} of job {self._job!r}: {path} exists and is not "
                        f"one of shard {self._shard}/{self._num_shards}; move it away and try again"
                    )
                temporaries.append(durable.temporary_name(path))
            try:
                for temporary in temporaries:
                    temporary.mkdir(mode=durable.FOLDER_MODE)
                    if tag:
                        tags.write(temporary, tag)
                written_bytes = self._write_into(temporaries, header, chunks, dict(state_arrays), taken)
                path = self._disks.place(temporaries, step)
            except BaseException as error:
                if not isinstance(error, HalfPlacedError):
                    with suppress(OSError):
                        self._disks.put_back()
                    for temporary in temporaries:
                        shutil.rmtree(temporary, ignore_errors=True)
                raise
        return Written(header.key, path, written_bytes)

    def tags(self) -> dict[str, CommitKey]:
        """The tags and the commit that each keeps until it is taken away: the newest that was given it."""
        return {tag: self._key(generation) for tag, generation in tags.holders(self._disks).items()}

    def tag(self, key: CommitKey, tag: str) -> None:
        """Tags a generation. Raises ValueError, GenerationMissingError and other StoreErrors."""
        check_tag(tag)
        with disk_errors(f"tag {key} of job {self._job!r}", self._folder):
            for part in self._find(key.step, key.commit_id).parts:
                tags.write(part, tag)
                durable.sync(part)

    def untag(self, tag: str) -> list[CommitKey]:
        """Takes a tag away from all generations that have it, and returns them.

        What nothing else keeps goes: now what was abandoned, with the next commit what is in place.
        """
        check_tag(tag)
        tagged = [g for g in (*self._disks.find(), *self._disks.abandoned()) if tag in tags.of(g)]
        keys = [self._key(generation) for generation in tagged]
        with disk_errors(f"take tag {tag!r} away from job {self._job!r}", self._folder):
            for generation in tagged:
                tags.take_away(self._disks, generation, tag)
        return keys

    def prune(self, *, keep: int, complete: CommitKey, current: CommitKey) -> list[CommitKey]:
        """Deletes what `complete` supersedes: older generations except those of the `keep` newest steps, and
        replaced ones. `complete` itself is put in place if it was replaced.

        complete: a commit that every server is known to have. If this server does not have it, nothing is
            deleted.
        current: the commit that the job in memory is at. It is never deleted.
        Returns the deleted ones.
        """
        generations = self._disks.find()
        keys = {generation: self._key(generation) for generation in generations}
        if complete not in keys.values():
            return []
        steps = self.committed_steps()
        kept_steps = set(steps[-keep:]) if keep > 0 else set()

        def superseded(generation: Generation) -> bool:
            if keys[generation] in (complete, current) or generation.step > complete.step:
                return False
            # At the step of `complete`, one that is in place is of a continuation that was abandoned.
            replaced = generation.step == complete.step or generation.number is not None
            return replaced or generation.step not in kept_steps

        with disk_errors(f"take tags away from job {self._job!r}", self._folder):
            tags.settle(self._disks, complete.step)
        doomed = [generation for generation in generations if superseded(generation)]
        # What a tag keeps stays where it is, if it is of this run.
        kept = [g for g in doomed if tags.of(g) and g.number is None and g.step < complete.step]
        doomed = [generation for generation in doomed if generation not in kept]
        self._delete(doomed)
        with disk_errors(f"clean up job {self._job!r}", self._folder):
            self._disks.put_back()
        return [keys[generation] for generation in doomed]

    def discard_after(self, step: int) -> list[int]:
        """Deletes generations newer than `step`, newest first, and returns their steps.

        For a job that went back and committed `step` anew: newer generations are of the run that was
        abandoned. Left where they are, they would be taken for the job's newest. What is tagged is set aside.
        """
        newer = [generation for generation in self._disks.find() if generation.step > step]
        # Of one step the replaced ones first: one that is left alone would be put back in place.
        newer.sort(key=lambda generation: -generation.step)
        self._delete(newer)
        return sorted({generation.step for generation in newer}, reverse=True)

    def clean(self) -> None:
        """Removes what interrupted writes and deletions left behind. For the start of a server."""
        with disk_errors(f"clean up job {self._job!r}", self._folder):
            self._disks.recover()

    def _write_into(
        self,
        folders: Sequence[Path],
        header: GenerationHeader,
        chunks: Iterable[ChunkState[ChunkValue]],
        states: dict[str, StateArray],
        taken: Callable[[ChunkState[ChunkValue]], None],
    ) -> int:
        writers = ThreadPoolExecutor(WRITE_THREADS * len(folders), thread_name_prefix="store-write")
        syncers = ThreadPoolExecutor(SYNC_THREADS * len(folders), thread_name_prefix="store-sync")
        try:
            # Beside the chunks, for which somebody may be waiting.
            metadata = [durable.write_files(_metadata_files(folder, header, states), syncers) for folder in folders]
            writer = ChunkWriter(folders, header, states, writers, syncers)
            for chunk in chunks:
                writer.add(chunk, partial(taken, chunk))
            written = writer.finish()
            for disk, folder in enumerate(folders):
                durable.drain(metadata[disk])
                if len(folders) > 1:
                    durable.write_file(folder / marker(self._shard, self._num_shards, disk, len(folders)), b"")
                own = shard_file.encode(header.key.step, self._shard, self._num_shards, written[disk])
                durable.write_file(folder / self._own_file, own)
                durable.sync_folders(folder, syncers)
        finally:
            # Waits for what is running: nothing may write into a folder that is being removed.
            writers.shutdown(cancel_futures=True)
            syncers.shutdown(cancel_futures=True)
        return writer.bytes_written

    def _reader(self, step: int, commit_id: str | None) -> ChunkReader:
        generation = self._find(step, commit_id)
        if missing := self._disks.missing(generation):
            raise DamagedError(self._incomplete(generation, missing))
        header, states = self._read_header(generation)
        remedy = self._remedy(generation)
        parts = {part: shard_file.read(part, step, self._shard, self._num_shards, remedy) for part in generation.parts}
        return ChunkReader(parts, header, states, remedy)

    def _key(self, generation: Generation) -> CommitKey:
        try:
            if missing := self._disks.missing(generation):
                raise DamagedError(self._incomplete(generation, missing))
            keys = set()
            for part in generation.parts:
                document = Fields.of_file(part / METADATA_FILE, self._remedy(generation))
                keys.add(CommitKey(generation.step, attributes.decode_key(document).commit_id))
            if len(keys) > 1:
                places = " and ".join(map(str, generation.parts))
                raise DamagedError(f"{places} are of different commits; {self._remedy(generation)}")
            return keys.pop()
        except StoreError as error:
            _log.warning("%s", error)
            return CommitKey(generation.step, "")

    def _incomplete(self, generation: Generation, missing: Sequence[str]) -> str:
        return (
            f"{' and '.join(map(str, generation.parts))} lacks what was on {' and '.join(missing)} of shard "
            f"{self._shard}/{self._num_shards}; name all --data-dir of this server, or {self._remedy(generation)}"
        )

    def _find(self, step: int, commit_id: str | None) -> Generation:
        for generation in reversed(self._disks.find()):
            if generation.step == step and commit_id in (None, self._key(generation).commit_id):
                return generation
        steps = self.committed_steps()
        of_commit = "" if commit_id is None else f", commit {commit_id},"
        raise GenerationMissingError(
            f"job {self._job!r} has no generation of step {step}{of_commit} in {self._folder}; "
            + (f"it has {', '.join(map(str, steps))}" if steps else "it has none")
        )

    def _read_header(self, generation: Generation) -> tuple[GenerationHeader, dict[str, StateArray]]:
        document = Fields.of_file(generation.path / METADATA_FILE, self._remedy(generation))
        header, states = attributes.decode(document, self._shard)
        for name, found, expected in (
            ("step", header.key.step, generation.step),
            ("num_shards", header.num_shards, self._num_shards),
        ):
            if found != expected:
                document.refuse(name, f"is {found}, and the file's place says {expected}")
        return header, states

    def _check(self, header: GenerationHeader, states: Mapping[str, StateArray], tag: str) -> None:
        if tag:
            check_tag(tag)
        if (header.job, header.shard, header.num_shards) != (self._job, self._shard, self._num_shards):
            raise ValueError(
                f"a generation of shard {header.shard}/{header.num_shards} of job {header.job!r} does not "
                f"belong to the store of shard {self._shard}/{self._num_shards} of job {self._job!r}"
            )
        check_id(header.key.commit_id)
        if header.key.step < 0 or any(name != state.name for name, state in states.items()):
            raise ValueError(f"step {header.key.step} is negative, or a state array is not under its own name")
        check_names(header.manifest, list(states))

    def _delete(self, generations: Iterable[Generation]) -> None:
        """Deletes what no tag keeps, and sets aside the rest."""
        with disk_errors(f"delete generations of job {self._job!r}", self._folder):
            for generation in generations:
                if tags.of(generation):
                    self._disks.abandon(generation)
                else:
                    self._disks.remove([generation])

    def _remedy(self, generation: Generation) -> str:
        older = [step for step in self.committed_steps() if step < generation.step]
        go_back = f", or move {generation.path} away on every server to go back to step {older[-1]}" if older else ""
        return f"put the file back from a copy{go_back}"


def _key_of(folder: Path) -> CommitKey | None:
    """Which commit a folder is of, whatever its name; None if it does not say."""
    try:
        return attributes.decode_key(Fields.of_file(folder / METADATA_FILE, ""))
    except StoreError:
        return None


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
