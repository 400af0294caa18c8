"""The generations of one job on all disks of a server: parts of one name, and renames that make or end them.

A generation on several disks is made and ended by one rename on each. A crash in between is made good by
`recover`, which looks at how far each disk got:

- Parts are renamed into place only once all of them are complete and on their disks. So one that is in place
  says that the others, which still have temporary names, may follow: the first rename is the commit.
- A part with the name of something doomed says that the others go, too. Nothing is deleted before all parts
  have such names.
- Parts that were set aside for one that is not in place anywhere go back.
"""

import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ps.store import durable, generation_folders
from ps.store.contents import CommitKey
from ps.store.disks import missing_disks
from ps.store.generation_folders import Aside, GenerationFolder, in_place

_DOOMED = "doomed-"


@dataclass(frozen=True)
class Generation:
    """number: as in `GenerationFolder`. parts: its folders, one on each disk that has something of it."""

    step: int
    number: int | None
    parts: tuple[Path, ...]

    @property
    def path(self) -> Path:
        return self.parts[0]


class HalfPlacedError(OSError):
    """Some parts of a generation are in place, others are not, and a disk refuses to be changed."""


class GenerationsOnDisks:
    """folders: of the job's generations, one on each disk. key_of: which commit a folder is of, or None."""

    def __init__(
        self,
        folders: Sequence[Path],
        shard: int,
        num_shards: int,
        own_file: str,
        key_of: Callable[[Path], CommitKey | None],
    ) -> None:
        self.folders = tuple(folders)
        self._shard = shard
        self._num_shards = num_shards
        self._own_file = own_file
        self._key_of = key_of
        # Whoever looks at all disks sees none in the middle of a rename.
        self._lock = threading.RLock()

    def find(self) -> list[Generation]:
        """The generations that have the file which completes them on some disk, by step; in one, the newest last."""
        with self._lock:
            return self._grouped(generation_folders.find_all)

    def abandoned(self) -> list[Generation]:
        """Those that only a tag keeps."""
        with self._lock:
            return self._grouped(generation_folders.find_abandoned)

    def missing(self, generation: Generation) -> list[str]:
        """Parts that are on no disk; empty if the generation is complete."""
        return missing_disks(generation.parts, self._shard, self._num_shards)

    def place(self, temporaries: Sequence[Path], step: int) -> Path:
        """Gives complete parts, one on each disk and synced, their name; what had it is set aside.

        Raises OSError, with the temporary names as before and `put_back` left to the caller; HalfPlacedError
        where a disk did not even let that happen.
        """
        targets = [in_place(folder, step) for folder in self.folders]
        with self._lock:
            placed: list[tuple[Path, Path]] = []
            try:
                self._aside([target for target in targets if target.exists()], step, "replaced")
                for temporary, target in zip(temporaries, targets, strict=True):
                    temporary.rename(target)
                    placed.append((target, temporary))
            except OSError as error:
                try:
                    for target, temporary in reversed(placed):
                        target.rename(temporary)
                except OSError:
                    # Parts in place and parts that are not: all of them stay, for `recover` to finish.
                    raise HalfPlacedError(error.errno, error.strerror) from error
                raise
            self._sync(self.folders)
        return targets[0]

    def put_back(self) -> None:
        """Where a step has replaced generations and none in place, puts the newest of them in place."""
        with self._lock:
            changed = []
            for folder in self.folders:
                found = generation_folders.find_all(folder)
                for step in {g.step for g in found} - {g.step for g in found if g.number is None}:
                    newest = max((g for g in found if g.step == step), key=lambda g: g.number or 0)
                    newest.path.rename(in_place(folder, step))
                    changed.append(folder)
            self._sync(changed)

    def abandon(self, generation: Generation) -> None:
        """Keeps a generation under a name that nothing goes on from."""
        with self._lock:
            self._aside(generation.parts, generation.step, "abandoned")
            self._sync(part.parent for part in generation.parts)

    def remove(self, generations: Iterable[Generation]) -> None:
        """Deletes generations, one after the other."""
        for generation in generations:
            with self._lock:
                doomed = [_doom(part) for part in generation.parts]
                self._sync(part.parent for part in generation.parts)
            for part in doomed:
                shutil.rmtree(part)

    def recover(self) -> None:
        """Finishes or undoes what a crash interrupted, and removes what interrupted writes and deletions left."""
        with self._lock:
            if len(self.folders) > 1:
                self._agree()
            self.put_back()
            for folder in self.folders:
                for temporary in _temporaries(folder):
                    shutil.rmtree(temporary)

    def _agree(self) -> None:
        """Has disks that did not get as far as others follow them."""
        doomed: set[CommitKey] = set()
        abandoned: dict[CommitKey, GenerationFolder] = {}
        committed: set[CommitKey] = set()
        for folder in self.folders:
            doomed |= {key for path in _temporaries(folder) if _DOOMED in path.name and (key := self._key_of(path))}
            abandoned |= {key: g for g in generation_folders.find_abandoned(folder) if (key := self._key_of(g.path))}
            found = generation_folders.find_all(folder)
            committed |= {key for g in found if g.number is None and (key := self._key_of(g.path))}
        for folder in self.folders:
            for generation in generation_folders.find_all(folder):
                key = self._key_of(generation.path)
                if key in doomed:
                    _doom(generation.path)
                elif key in abandoned:
                    other = abandoned[key]
                    generation.path.rename(generation_folders.aside(folder, other.step, "abandoned", other.number or 1))
            for generation in generation_folders.find_abandoned(folder):
                if self._key_of(generation.path) in doomed:
                    _doom(generation.path)
            for path in _temporaries(folder):
                if _DOOMED in path.name or not (path / self._own_file).is_file():
                    continue
                key = self._key_of(path)
                if key is not None and key in committed:
                    target = in_place(folder, key.step)
                    if target.exists():
                        self._aside([target], key.step, "replaced")
                    path.rename(target)
        self._sync(self.folders)

    def _aside(self, parts: Sequence[Path], step: int, kind: Aside) -> None:
        """Renames parts of one generation. The caller syncs."""
        find = generation_folders.find_all if kind == "replaced" else generation_folders.find_abandoned
        numbers = [g.number or 0 for folder in self.folders for g in find(folder) if g.step == step]
        for part in parts:
            part.rename(generation_folders.aside(part.parent, step, kind, max(numbers, default=0) + 1))

    def _grouped(self, find: Callable[[Path], list[GenerationFolder]]) -> list[Generation]:
        by_name: dict[tuple[int, int | None], list[Path]] = {}
        for folder in self.folders:
            for generation in find(folder):
                if (generation.path / self._own_file).is_file():
                    by_name.setdefault((generation.step, generation.number), []).append(generation.path)
        found = [Generation(step, number, tuple(parts)) for (step, number), parts in by_name.items()]
        return sorted(found, key=lambda g: (g.step, g.number is None, g.number or 0))

    def _sync(self, folders: Iterable[Path]) -> None:
        for folder in dict.fromkeys(folders):
            if folder.is_dir():
                durable.sync(folder)


def _temporaries(folder: Path) -> Iterator[Path]:
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        if path.is_dir() and durable.is_temporary(path.name):
            yield path


def _doom(part: Path) -> Path:
    doomed = durable.temporary_name(part, _DOOMED)
    part.rename(doomed)
    return doomed
