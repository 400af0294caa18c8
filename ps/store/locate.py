"""Finding generations below folders that a person names: data folders, a job's folder, single generations."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ps.store import attributes, generation_folders
from ps.store.arrays import METADATA_FILE
from ps.store.claim import CLAIM_FILE
from ps.store.contents import CommitKey
from ps.store.errors import GenerationMissingError, StoreError
from ps.store.fields import Fields
from ps.store.generation_folders import GenerationFolder
from ps.store.job_store import GENERATIONS

_SHARD_FILE = re.compile(r"shard-(0|[1-9]\d{0,5})-of-([1-9]\d{0,5})\.json")

_ATTEMPTS = 100

REMEDY = "put the file back from a copy, or choose another generation with --step"


@dataclass(frozen=True)
class FoundFolder:
    """A generation's folder, as far as its place and its key tell; what it holds was not looked at.

    root: the folder that was named, which it is or is in.
    job: by its place in a data folder, else as its `zarr.json` says; "" where neither tells.
    replaced: counts the replaced generations of a step (`generation_folders`); None for the one in place.
    shards: (shard, num_shards) of whom this has chunks: one, unless servers' folders were copied over
        each other.
    identity: (device, inode), which tells it from another one that has its name later.
    problem: why the key or the shards cannot be told; None if they can. The commit_id is "" then.
    """

    root: Path
    job: str
    path: Path
    replaced: int | None
    key: CommitKey
    shards: tuple[tuple[int, int], ...]
    identity: tuple[int, int]
    problem: str | None = None

    @property
    def is_there(self) -> bool:
        """Whether it has not been deleted, replaced or renamed since it was found."""
        return _identity(self.path) == self.identity


def find_folders(folders: Sequence[Path], job: str | None = None) -> list[FoundFolder]:
    """The generations below `folders`, folder by folder, by step, of one step the newest last.

    folders: data folders of servers, folders of jobs in them, and single generations, in any mixture.
    job: only of this job.

    Servers may commit meanwhile: the answer is one that was true at an instant. Raises
    GenerationMissingError for a folder that is nothing of all this, and StoreError if it cannot be read.
    """
    roots = list({Path(folder).resolve(): Path(folder) for folder in folders}.values())
    found: list[FoundFolder] = []
    for attempt in range(_ATTEMPTS):
        again = [folder for root in roots for folder in _below(root, job)]
        if attempt and again == found:
            break
        found = again
    return found


def _below(root: Path, job: str | None) -> Iterator[FoundFolder]:
    try:
        if _is_generation(root):
            yield from _described(root, None, root, job)
        elif (root / CLAIM_FILE).is_file() or job_names(root):
            for name in job_names(root):
                for generation in _generations(root / name) if job in (None, name) else ():
                    yield from _described(root, name, generation.path, job, generation)
        elif (root / GENERATIONS).is_dir():
            for generation in _generations(root):
                yield from _described(root, None, generation.path, job, generation)
        else:
            inside = sorted(path.name for path in root.iterdir() if (path / CLAIM_FILE).is_file())
            raise GenerationMissingError(
                f"{root} holds no generation: it is neither a server's data folder (--data-dir), nor the folder of a "
                "job in one, nor a generation; "
                + (f"name the servers' folders in it, {', '.join(inside)}" if inside else "check the name")
            )
    except OSError as error:
        raise GenerationMissingError(f"cannot read {root}: {error.strerror or error}; check the name") from error


def job_names(root: Path) -> list[str]:
    """The jobs in a server's data folder, by the names of their folders. Raises OSError."""
    return sorted(path.name for path in root.iterdir() if (path / GENERATIONS).is_dir())


def _generations(job_folder: Path) -> list[GenerationFolder]:
    return generation_folders.find_all(job_folder / GENERATIONS)


def _is_generation(folder: Path) -> bool:
    return (folder / METADATA_FILE).is_file() and bool(_shards(folder))


def _described(
    root: Path, job: str | None, path: Path, wanted: str | None, place: GenerationFolder | None = None
) -> Iterator[FoundFolder]:
    """What is known of a generation; nothing if it is of another job or was deleted just now.

    place: what its name says, where it is among others.
    """
    problem = None
    identity = _identity(path)
    try:
        stated, key = _key(path)
        if place is not None and key.step != place.step:
            problem = f"{path / METADATA_FILE} says step {key.step}, and its folder says {place.step}; {REMEDY}"
    except StoreError as error:
        stated, key, problem = "", CommitKey(0, ""), str(error)
    shards = _shards(path)
    if not shards:
        problem = problem or f"{path} has no file shard-<i>-of-<n>.json, which says what it holds; {REMEDY}"
    if problem is not None:
        key = CommitKey(key.step if place is None else place.step, "")
    if identity is None or _identity(path) != identity:
        return
    if wanted in (None, job or stated) or (problem is not None and not (job or stated)):
        replaced = None if place is None else place.number
        yield FoundFolder(root, job or stated, path, replaced, key, shards, identity, problem)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _key(folder: Path) -> tuple[str, CommitKey]:
    document = Fields.of_file(folder / METADATA_FILE, REMEDY)
    return attributes.decode_job(document), attributes.decode_key(document)


def _shards(folder: Path) -> tuple[tuple[int, int], ...]:
    matches = (_SHARD_FILE.fullmatch(path.name) for path in folder.glob("shard-*.json"))
    return tuple(sorted((int(m[1]), int(m[2])) for m in matches if m and int(m[1]) < int(m[2])))
