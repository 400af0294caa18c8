"""One commit of a whole model: its folders on all servers, together.

`find_generation` is what tools begin with: from folders that a person names to a commit that is complete
over them. It only reads and takes no lock, and may be used beside running servers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from protos.layout import ChunkGrid
from ps.store import attributes, shard_file
from ps.store.arrays import METADATA_FILE, ChunkedArray, all_arrays, value_array
from ps.store.contents import CommitKey, GenerationHeader, StateArray
from ps.store.disks import missing_disks
from ps.store.errors import DamagedError, GenerationMissingError, StoreError
from ps.store.fields import Fields
from ps.store.locate import REMEDY, FoundFolder, find_folders
from ps.store.shard_file import HeldChunks

_ATTEMPTS = 5


class PartsMissingError(GenerationMissingError):
    """Not all chunks of a commit are in the folders that were named."""


@dataclass(frozen=True)
class Part:
    """What one folder holds of a generation."""

    path: Path
    shard: int
    held: HeldChunks


@dataclass(frozen=True)
class GenerationSet:
    """A commit that is complete over its parts: every chunk of every weight and buffer is in exactly one.

    header: the same on all servers; its `shard` means nothing here.
    states: what the optimizer class keeps, by name.

    Servers that run may delete it while it is read: reading then fails with DamagedError.
    """

    header: GenerationHeader
    states: Mapping[str, StateArray]
    parts: tuple[Part, ...]

    @property
    def key(self) -> CommitKey:
        return self.header.key

    @cached_property
    def arrays(self) -> dict[str, ChunkedArray]:
        """Every array of the model by its path, in the order of the manifest."""
        return {array.path: array for array in all_arrays(self.header.manifest, self.states)}

    def part_with(self, array: ChunkedArray, chunk: int) -> Part | None:
        """The part that has a chunk's file: None only for state of a chunk that was never stepped."""
        return self._places.get((array.path, chunk))

    @cached_property
    def chunk_bytes(self) -> int:
        """The size of all chunks, in bytes; that of their files, if they are not compressed."""
        return sum(self.arrays[path].chunk_bytes for path, _ in self._places)

    @cached_property
    def _places(self) -> dict[tuple[str, int], Part]:
        return {
            (path, chunk): part for part in self.parts for path, chunks in part.held.chunks.items() for chunk in chunks
        }


def find_generation(folders: Sequence[Path], *, job: str | None = None, step: int | None = None) -> GenerationSet:
    """The commit of `step`, else the newest one, that is complete over `folders`.

    folders: server's data folders, all of the set, in any order; or folders of the job in them, or of
        single generations.
    job: needed only where the folders hold several.

    Raises GenerationMissingError if there is none, or several jobs; DamagedError and NewerFormatError for
    files that cannot be what they should be. The message says what each folder has.
    """
    for attempt in range(_ATTEMPTS):
        found = of_one_job(find_folders(folders, job))
        try:
            return _newest_complete(found, step)
        except StoreError:
            # A server that runs may have deleted what was being read, and has something newer then.
            if attempt == _ATTEMPTS - 1 or find_folders(folders, job) == found:
                raise
    raise AssertionError


def of_one_job(found: Sequence[FoundFolder]) -> list[FoundFolder]:
    """Raises GenerationMissingError if the folders are of several jobs."""
    jobs = sorted({folder.job for folder in found if folder.job})
    if len(jobs) > 1:
        raise GenerationMissingError(
            f"there are several jobs here, {', '.join(map(repr, jobs))}; choose one with --job (job= in Python)"
        )
    return list(found)


def complete_keys(found: Sequence[FoundFolder]) -> list[tuple[CommitKey, int]]:
    """The commits of which there is every part of every shard, the newest last, with their num_shards.

    As when trainers connect (`trainer/connect.py`): of one step, in the order in which they were written.
    """
    commits = dict.fromkeys((f.key, num_shards) for f in found if f.problem is None for _, num_shards in f.shards)
    # The sort is stable: within a step the order of the first folder stays.
    return sorted((c for c in commits if not missing_parts(found, *c)), key=lambda commit: commit[0].step)


def missing_parts(found: Sequence[FoundFolder], key: CommitKey, num_shards: int) -> list[str]:
    """Which parts of a commit no folder has: "shard 1/2", "disk 0 of 2 of shard 1/2"."""
    paths: dict[int, list[Path]] = {shard: [] for shard in range(num_shards)}
    for folder in found:
        for shard, of in folder.shards if folder.key == key and folder.problem is None else ():
            if of == num_shards:
                paths[shard].append(folder.path)
    missing = []
    for shard, parts in paths.items():
        disks = missing_disks(parts, shard, num_shards) if parts else []
        missing += [f"{disk} of shard {shard}/{num_shards}" for disk in disks]
        missing += [] if parts else [f"shard {shard}/{num_shards}"]
    return missing


def load(found: Sequence[FoundFolder], key: CommitKey, num_shards: int) -> GenerationSet:
    """The parts of a commit among `found`, read and compared.

    Raises PartsMissingError if chunks are missing, DamagedError if the parts do not fit each other.
    """
    folders = [folder for folder in found if folder.key == key and folder.problem is None]
    documents = {folder.path: _read(folder.path / METADATA_FILE) for folder in folders}
    first = folders[0].path
    for path, document in documents.items():
        if document != documents[first]:
            raise DamagedError(
                f"{path / METADATA_FILE} differs from {first / METADATA_FILE}, and both are of {key}: one of them "
                f"was changed, or their servers were started with different --compress; {REMEDY}"
            )
    header, states = attributes.decode(Fields.of_file(first / METADATA_FILE, REMEDY), 0)
    if header.num_shards != num_shards:
        raise DamagedError(
            f"{first / METADATA_FILE} is of {header.num_shards} servers, and its shard file of {num_shards}; {REMEDY}"
        )
    for folder in folders:
        if folder.job != header.job:
            raise DamagedError(
                f"{folder.path / METADATA_FILE} is of job {header.job!r}, and its place is job {folder.job!r}'s; "
                f"{REMEDY}"
            )
    parts = tuple(
        Part(folder.path, shard, shard_file.read(folder.path, key.step, shard, num_shards, REMEDY))
        for folder in folders
        for shard, of in folder.shards
        if of == num_shards
    )
    result = GenerationSet(header, states, parts)
    _check_complete(result)
    return result


def _newest_complete(all_found: Sequence[FoundFolder], step: int | None) -> GenerationSet:
    found = [folder for folder in all_found if step in (None, folder.key.step)]
    candidates = complete_keys(found)
    newest = candidates[-1][0].step if candidates else -1
    for folder in found:
        # As for trainers that connect: not passed over, since it may be the newest commit that is damaged.
        if folder.problem is not None and folder.replaced is None and folder.key.step > newest:
            raise DamagedError(folder.problem)
    missing: PartsMissingError | None = None
    for key, num_shards in reversed(candidates):
        try:
            return load(found, key, num_shards)
        except PartsMissingError as error:
            missing = missing or error
    raise missing or GenerationMissingError(nothing_complete(all_found, step))


def nothing_complete(found: Sequence[FoundFolder], step: int | None) -> str:
    """Says what each folder has, for want of a commit that all have."""
    held: dict[Path, set[str]] = {}
    shards: dict[Path, set[str]] = {}
    for folder in found:
        held.setdefault(folder.root, set()).add(f"{folder.key.step:d}")
        shards.setdefault(folder.root, set()).update(f"{shard}/{of}" for shard, of in folder.shards)
    described = "; ".join(
        f"{root} has shard {', '.join(sorted(shards[root])) or '?'} at step {', '.join(sorted(steps, key=int))}"
        for root, steps in held.items()
    )
    which = "no generation" if step is None else f"no generation of step {step}"
    return (
        f"{which} is complete over these folders: {described or 'they have none'}.{_lacking(found)} Name all data "
        "folders of all servers of the set"
    )


def _lacking(found: Sequence[FoundFolder]) -> str:
    """What the newest commit is not complete without, if it is not: " Step 3 lacks disk 1 of 2 of shard 0/1."."""
    commits = [(f.key, num_shards) for f in found if f.problem is None for _, num_shards in f.shards]
    if not commits:
        return ""
    key, num_shards = max(commits, key=lambda commit: commit[0].step)
    missing = missing_parts(found, key, num_shards)
    more = " and more" if len(missing) > 5 else ""
    return f" Step {key.step} lacks {', '.join(missing[:5])}{more}." if missing else ""


def _check_complete(generation: GenerationSet) -> None:
    places: dict[tuple[str, int], Part] = {}
    for part in generation.parts:
        for path, chunks in part.held.chunks.items():
            for chunk in chunks:
                other = places.setdefault((path, chunk), part)
                if other is not part:
                    raise DamagedError(
                        f"chunk {chunk} of {path} is both in {other.path} and in {part.path}; name one copy of each "
                        "server's folder"
                    )
    for path, chunk in weight_chunks(generation.header):
        if (path, chunk) not in places:
            raise PartsMissingError(
                f"chunk {chunk} of {path} of {generation.key} is in none of "
                f"{', '.join(str(part.path) for part in generation.parts)}; name the data folders of all servers"
            )


def weight_chunks(header: GenerationHeader) -> Iterator[tuple[str, int]]:
    """Path of the array and index of every chunk that a complete generation has. Of state, it may lack some."""
    for parameter in header.manifest:
        path = value_array(parameter).path
        yield from ((path, chunk) for chunk in range(ChunkGrid.of(parameter.shape).num_chunks))


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DamagedError(f"cannot read {file}: {error.strerror or error}; {REMEDY}") from error
