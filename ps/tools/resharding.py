"""From the folders of S servers to those of S': the same files, in other folders."""

import errno
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from protos.layout import place_all
from ps.store import (
    ChunkFile,
    ChunkState,
    CommitKey,
    DamagedError,
    DataDir,
    GenerationMissingError,
    JobStore,
    StoreError,
    checksum,
    durable,
    tags,
    unfinished,
)
from ps.store.arrays import ChunkedArray, state_array, value_array
from ps.store.claim import CLAIM_FILE, read_claim
from ps.store.folder_lock import LOCK_FILE, FolderLock
from ps.store.generation_set import GenerationSet, complete_keys, find_generation
from ps.store.job_store import GENERATIONS
from ps.store.locate import FoundFolder, find_folders, job_names
from ps.tools.errors import ToolError
from ps.tools.progress import Advance, Progress, silent
from ps.tools.verification import verify


@dataclass(frozen=True)
class Resharded:
    """What was done.

    filled: how many targets; the others had the commit already, from a run that was interrupted.
    copied_bytes: of files that could not be linked, since the target is on another file system.
    removed, left: with `move`, the source's folders of this commit, and the steps of the job that it still has.
    """

    job: str
    key: CommitKey
    num_shards: int
    filled: int = 0
    copied_bytes: int = 0
    removed: tuple[Path, ...] = ()
    left: tuple[int, ...] = ()


def reshard(
    sources: Sequence[Path],
    targets: Sequence[Path],
    *,
    job: str | None = None,
    step: int | None = None,
    move: bool = False,
    progress: Progress = silent,
) -> Resharded:
    """Makes `targets` the data folders of `len(targets)` servers, from shard 0 on, that hold a commit.

    Files are linked; where source and target are on different file systems they are copied, and all checksums
    of the targets compared in the end.

    sources, job, step: which commit, as for `find_generation`. None of their servers may run.
    targets: need not exist. One that does is empty, or belongs to the same shard of as many servers and lacks
        the job.
    move: once all checksums of the targets were compared, deletes the commit, and only that, from the source.

    Interrupted at any instant, the source is whole or, with `move`, the targets are; servers refuse targets that
    are not finished; and called again, this goes on.

    Raises ToolError and DataDirError for what cannot be begun, and other StoreErrors for what failed.
    """
    _check_apart(sources, targets)
    with ExitStack() as stack:
        for folder in _data_folders(sources):
            _lock(folder, stack)
        if move and (moved := _go_on_moving(sources, targets, job, step, progress)):
            return moved
        generation = find_generation(sources, job=job, step=step)
        for shard, folder in enumerate(targets):
            _has_commit(folder, shard, len(targets), generation)
        for shard, folder in enumerate(targets):
            stack.enter_context(DataDir(folder, shard, len(targets), filling=True))
        missing = [
            shard for shard, folder in enumerate(targets) if not _has_commit(folder, shard, len(targets), generation)
        ]
        unsure = bool(missing) or any(unfinished.find(folder) for folder in targets)
        copied_bytes = 0
        if unsure:
            # All of them before any is filled: no server may start with one of a set that is not finished.
            for folder in targets:
                unfinished.put(folder, _mark(generation))
            copied_bytes = _fill(targets, missing, generation, progress)
        if move or copied_bytes or (unsure and len(missing) < len(targets)):
            _verify(targets, generation, progress)
        if unsure:
            for folder in targets:
                unfinished.clear(folder)
        removed, left = _remove(sources, find_folders(sources, generation.header.job), generation) if move else ((), ())
    return Resharded(generation.header.job, generation.key, len(targets), len(missing), copied_bytes, removed, left)


def _fill(targets: Sequence[Path], missing: Sequence[int], generation: GenerationSet, progress: Progress) -> int:
    """Writes the shards that are missing. Returns the bytes that were copied; the others are linked."""
    header = generation.header
    copied_bytes = 0
    with progress(f"resharding step {generation.key.step}", generation.chunk_bytes) as advance:
        for shard in missing:
            folder = targets[shard]
            if (folder / header.job).exists():
                shutil.rmtree(folder / header.job)  # Of a run that was interrupted, as the mark says.
            store = JobStore(folder, header.job, shard, len(targets))
            files = _chunk_files(generation, shard, len(targets), advance)
            own_header = replace(header, shard=shard, num_shards=len(targets))
            copied_bytes += store.write(own_header, files, generation.states).bytes_written
    found = tags.in_folders(part.path for part in generation.parts)
    for shard, folder in enumerate(targets):
        for tag in found:
            JobStore(folder, header.job, shard, len(targets)).tag(generation.key, tag)
    return copied_bytes


def _chunk_files(
    generation: GenerationSet, shard: int, num_shards: int, advance: Advance
) -> Iterator[ChunkState[ChunkFile]]:
    """The files of the chunks that a shard of the new set holds."""
    manifest = generation.header.manifest
    placement = place_all([parameter.shape for parameter in manifest], num_shards)
    for index, (parameter, shards) in enumerate(zip(manifest, placement, strict=True)):
        kinds = generation.states.values() if parameter.has_state else ()
        for chunk, holder in enumerate(shards):
            if holder != shard:
                continue
            weight = _chunk_file(generation, value_array(parameter), chunk)
            assert weight is not None, "a generation that is complete has every weight"
            states = {kind.name: _chunk_file(generation, state_array(parameter, kind), chunk) for kind in kinds}
            files = {name: file for name, file in states.items() if file is not None}
            yield ChunkState(index, chunk, weight, files)
            advance(sum(file.path.stat().st_size for file in (weight, *files.values())))


def _chunk_file(generation: GenerationSet, array: ChunkedArray, chunk: int) -> ChunkFile | None:
    """None for state of a chunk that was never stepped."""
    part = generation.part_with(array, chunk)
    if part is None:
        return None
    path = part.path / array.chunk_key(chunk)
    known = part.held.crc32c(array, chunk)
    # Counted here for want of it, not of the copy: a copy that went wrong has to differ.
    return ChunkFile(path, checksum.of_file(path) if known is None else known, True, array.encoding)


def _verify(targets: Sequence[Path], generation: GenerationSet, progress: Progress) -> None:
    report = verify(targets, job=generation.header.job, step=generation.key.step, progress=progress)
    if not report.ok:
        raise DamagedError(
            f"what was written is not whole, so the source was left as it is: {report.problems[0]} "
            f"({len(report.problems)} problems). If 'zero-ps verify' finds none in the source, delete the targets and "
            "try again"
        )


def _go_on_moving(
    sources: Sequence[Path], targets: Sequence[Path], job: str | None, step: int | None, progress: Progress
) -> Resharded | None:
    """Ends a move whose targets are whole, of whose source something may be gone; None if there is none."""
    try:
        if any(unfinished.find(folder) for folder in targets):
            return None
        done = find_generation(targets, job=job)
    except StoreError:
        return None
    if done.header.num_shards != len(targets) or step not in (None, done.key.step):
        return None
    try:
        found = find_folders(sources, done.header.job)
    except GenerationMissingError:
        if not all(source.is_dir() for source in sources):
            raise
        found = []  # Nobody's folders any more: everything was deleted.
    newer = (key for key, _ in complete_keys(found) if key != done.key and key.step >= done.key.step)
    if any(newer):
        return None
    if any(folder.key == done.key for folder in found):
        _verify(targets, done, progress)
    removed, left = _remove(sources, found, done)
    return Resharded(done.header.job, done.key, len(targets), removed=removed, left=left)


def _remove(
    sources: Sequence[Path], found: Sequence[FoundFolder], generation: GenerationSet
) -> tuple[tuple[Path, ...], tuple[int, ...]]:
    """Deletes a commit from the source, and what is empty then. Returns its folders, and the steps that are left."""
    removed = tuple(folder.path for folder in found if folder.key == generation.key)
    for path in removed:
        durable.remove_folder(path)
    for data_folder in _data_folders(sources):
        generations = data_folder / generation.header.job / GENERATIONS
        for path in generations.glob(".*"):
            if durable.is_temporary(path.name):
                shutil.rmtree(path)  # Of a deletion that was interrupted.
        with suppress(OSError):
            generations.rmdir()
            generations.parent.rmdir()
        # Nobody's folder then, as before its first server was started.
        if not job_names(data_folder):
            (data_folder / CLAIM_FILE).unlink()
    return removed, tuple(sorted({folder.key.step for folder in found if folder.key != generation.key}))


def _has_commit(folder: Path, shard: int, num_shards: int, generation: GenerationSet) -> bool:
    """Whether a target has its part of the commit already. Raises ToolError if it must not be written to."""
    job = generation.header.job
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise ToolError(f"{folder} is a file; name a folder in --to, which need not exist")
    claimed = read_claim(folder)
    if claimed is None:
        names = sorted(path.name for path in folder.iterdir())
        # A run that was interrupted may have left its lock, and a claim that it was about to put in place.
        others = [name for name in names if name != LOCK_FILE and not durable.is_temporary(name)]
        if others:
            raise ToolError(f"{folder} is not empty: it has {others[0]!r}; choose another folder for --to")
        return False
    if claimed != (shard, num_shards):
        raise ToolError(
            f"{folder} belongs to shard {claimed[0]}/{claimed[1]}, and would have to be shard {shard}/{num_shards}; "
            "choose another folder for --to, or put them in another order"
        )
    marked = unfinished.find(folder)
    if marked is not None and marked != _mark(generation):
        raise ToolError(
            f"{folder} is being filled with job {marked.job!r}; run that 'zero-ps {marked.tool}' again first, or "
            "delete the folder"
        )
    keys = JobStore(folder, job, shard, num_shards).committed()
    if marked is None and keys != [generation.key] and (folder / job).exists():
        at = f"at {keys[-1]}" if keys else "with nothing that can be read"
        raise ToolError(
            f"{folder} has job {job!r} already, {at}, and what is resharded is at {generation.key}; choose other "
            "folders for --to"
        )
    return keys == [generation.key]


def _mark(generation: GenerationSet) -> unfinished.Mark:
    return unfinished.Mark(generation.header.job, "reshard")


def _check_apart(sources: Sequence[Path], targets: Sequence[Path]) -> None:
    """Raises ToolError if a target is another target or a source, or in one, or around one."""
    for i, target in enumerate(targets):
        for flag, others in (("--to", targets[:i]), ("--from", sources)):
            for other in others:
                inner, outer = sorted((target.resolve(), other.resolve()), key=lambda path: -len(path.parts))
                if inner.is_relative_to(outer):
                    raise ToolError(
                        f"{target} of --to and {other} of {flag} are the same, or one in the other; a server needs a "
                        "folder of its own"
                    )


def _data_folders(sources: Sequence[Path]) -> list[Path]:
    """The data folders of servers that the sources are, or are in."""
    resolved = [source.resolve() for source in sources]
    around = (folder for source in resolved for folder in (source, *list(source.parents)[:3]))
    return list(dict.fromkeys(folder for folder in around if (folder / CLAIM_FILE).is_file()))


def _lock(folder: Path, stack: ExitStack) -> None:
    try:
        lock = FolderLock(folder, f"cannot reshard {folder}", "stop that server first")
    except OSError as error:
        if error.errno == errno.EROFS:
            return  # No server runs where nothing can be written.
        raise ToolError(f"cannot lock {folder}: {error.strerror}; it has to be writable for this user") from error
    stack.callback(lock.close)
