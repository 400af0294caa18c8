"""Compares everything that the files of one commit say with what is there."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from protos.layout import place_all
from ps.store import attributes, shard_file
from ps.store.arrays import (
    DIMENSIONS,
    METADATA_FILE,
    ChunkedArray,
    all_arrays,
    group_metadata,
    state_array,
    value_array,
)
from ps.store.checksum import PIECE_BYTES, extend
from ps.store.contents import CommitKey, GenerationHeader, StateArray
from ps.store.errors import StoreError
from ps.store.fields import Fields
from ps.store.generation_set import Part
from ps.store.locate import FoundFolder
from ps.tools.progress import Advance, Progress

THREADS = 4
"""Files read at a time: enough to keep a disk busy."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file or folder, and what to do. As text, it names the file."""

    file: Path
    message: str

    def __str__(self) -> str:
        return self.message if str(self.file) in self.message else f"{self.file} {self.message}"


@dataclass(frozen=True)
class GenerationReport:
    """What was found of one commit.

    files, bytes: of its chunks, those that were looked at.
    without_checksum: how many of these files were written without one, so that only their size was compared.
    problems: empty if it is whole.
    """

    job: str
    key: CommitKey
    num_shards: int
    folders: tuple[Path, ...]
    files: int
    bytes: int
    without_checksum: int
    problems: tuple[Problem, ...]


def check_generation(
    folders: Sequence[FoundFolder], key: CommitKey, num_shards: int, remedy: str, progress: Progress
) -> GenerationReport:
    """Reads everything of a commit, of which `folders` have all that was named.

    remedy: what to do about a file that is damaged.
    """
    check = _Check(folders, key, num_shards, remedy)
    check.run(progress)
    return GenerationReport(
        job=folders[0].job,
        key=key,
        num_shards=num_shards,
        folders=tuple(folder.path for folder in folders),
        files=check.files,
        bytes=check.bytes,
        without_checksum=check.without_checksum,
        problems=tuple(check.problems),
    )


class _Check:
    def __init__(self, folders: Sequence[FoundFolder], key: CommitKey, num_shards: int, remedy: str) -> None:
        self.problems: list[Problem] = []
        self.files = 0
        self.bytes = 0
        self.without_checksum = 0
        self._folders = folders
        self._key = key
        self._num_shards = num_shards
        self._remedy = remedy

    def run(self, progress: Progress) -> None:
        parts, unread = self._read_parts()
        described = self._read_header()
        if described is None:
            return
        header, states = described
        arrays = {array.path: array for array in all_arrays(header.manifest, states)}
        for folder in self._folders:
            self._compare_metadata(folder, arrays.values())
            self._find_strays(folder.path, [part for part in parts if part.path == folder.path], arrays.values())
        places = self._places(parts, arrays)
        self._compare_placement(header, states, places, unread)
        total = sum(array.chunk_bytes for array, _ in places)
        executor = ThreadPoolExecutor(THREADS, thread_name_prefix="verify")
        try:
            with progress(f"checking step {self._key.step}", total) as advance:
                for size, with_checksum in executor.map(partial(self._check_file, advance), places.items()):
                    self.files += 1
                    self.bytes += size
                    self.without_checksum += not with_checksum
        finally:
            executor.shutdown(cancel_futures=True)

    def _add(self, file: Path, what: str) -> None:
        self.problems.append(Problem(file, f"{what}; {self._remedy}"))

    def _read_parts(self) -> tuple[list[Part], set[int]]:
        """The parts, and the shards of which some part cannot be read."""
        parts, unread = [], set()
        for folder in self._folders:
            for shard, num_shards in folder.shards:
                if num_shards != self._num_shards:
                    continue
                try:
                    held = shard_file.read(folder.path, self._key.step, shard, num_shards, self._remedy)
                    parts.append(Part(folder.path, shard, held))
                except StoreError as error:
                    unread.add(shard)
                    self.problems.append(Problem(folder.path / shard_file.file_name(shard, num_shards), str(error)))
        return parts, unread

    def _read_header(self) -> tuple[GenerationHeader, dict[str, StateArray]] | None:
        """As the first folder states it. Whether the others do is compared with it."""
        first = self._folders[0].path / METADATA_FILE
        try:
            header, states = attributes.decode(Fields.of_file(first, self._remedy), 0)
        except StoreError as error:
            self.problems.append(Problem(first, str(error)))
            return None
        if header.num_shards != self._num_shards:
            self._add(first, f"says {header.num_shards} servers, and the shard file beside it {self._num_shards}")
            return None
        for folder in self._folders:
            if folder.job != header.job:
                self._add(folder.path / METADATA_FILE, f"is of job {header.job!r}, and its folder of {folder.job!r}")
        return header, states

    def _compare_metadata(self, folder: FoundFolder, arrays: Iterable[ChunkedArray]) -> None:
        first = self._folders[0]
        expected = {array.path: array.metadata() for array in arrays}
        expected |= {path.split("/")[0]: group_metadata({}) for path in expected}
        for path, document in expected.items():
            self._compare_document(folder.path / path / METADATA_FILE, document, "the group's attributes")
        if folder is not first:
            try:
                document = (first.path / METADATA_FILE).read_bytes()
            except OSError:
                return  # Deleted just now.
            self._compare_document(folder.path / METADATA_FILE, document, str(first.path / METADATA_FILE))

    def _compare_document(self, file: Path, expected: bytes, whose: str) -> None:
        try:
            found = file.read_bytes()
            if found == expected:
                return
            difference = _difference(_completed(json.loads(found), json.loads(expected)), json.loads(expected))
        except OSError as error:
            self._add(file, f"cannot be read ({error.strerror})")
        except (ValueError, RecursionError) as error:
            self._add(file, f"is not JSON ({error})")
        else:
            if difference is not None:
                self._add(file, f"is not what {whose} make it: {difference}")

    def _find_strays(self, folder: Path, parts: Sequence[Part], arrays: Iterable[ChunkedArray]) -> None:
        """Files where chunks are, and which none of the folder's parts lists: other readers would read them."""
        for array in arrays:
            listed = {array.chunk_key(chunk) for part in parts for chunk in part.held.chunks.get(array.path, ())}
            for key in _files_below(folder, f"{array.path}/c"):
                if key not in listed:
                    what = "is not listed in the folder's shard file, and readers take it for a chunk; delete it"
                    self.problems.append(Problem(folder / key, what))

    def _places(
        self, parts: Sequence[Part], arrays: Mapping[str, ChunkedArray]
    ) -> dict[tuple[ChunkedArray, int], Part]:
        """The chunks that are listed, and where. Those that cannot be are problems."""
        places: dict[tuple[ChunkedArray, int], Part] = {}
        for part in parts:
            lists = part.path / shard_file.file_name(part.shard, self._num_shards)
            for path, chunks in part.held.chunks.items():
                array = arrays.get(path)
                if array is None:
                    self._add(lists, f"lists chunks of {path}, which is no array of the model")
                    continue
                for chunk in chunks:
                    other = places.setdefault((array, chunk), part)
                    if other is not part:
                        key = array.chunk_key(chunk)
                        what = f"is there twice, also as {other.path / key}; name one copy of each server's folder"
                        self.problems.append(Problem(part.path / key, what))
        return places

    def _compare_placement(
        self,
        header: GenerationHeader,
        states: Mapping[str, StateArray],
        places: Mapping[tuple[ChunkedArray, int], Part],
        unread: set[int],
    ) -> None:
        """Whether every chunk is there, and on the server that would look for it."""
        expected = set()
        placement = place_all([parameter.shape for parameter in header.manifest], self._num_shards)
        for parameter, shards in zip(header.manifest, placement, strict=True):
            weight = value_array(parameter)
            others = [state_array(parameter, state) for state in states.values()] if parameter.has_state else []
            for chunk, shard in enumerate(shards):
                if (weight, chunk) not in places and shard not in unread:
                    self._add(
                        self._folders[0].path,
                        f"is of a commit of which chunk {chunk} of {weight.path} is nowhere; shard "
                        f"{shard}/{self._num_shards} should have it, so name all of that server's folders",
                    )
                for array in (weight, *others):
                    expected.add((array, chunk))
                    part = places.get((array, chunk))
                    if part is not None and part.shard != shard:
                        self._add(
                            part.path / array.chunk_key(chunk),
                            f"is of shard {part.shard}/{self._num_shards}, and belongs to shard {shard}",
                        )
        for array, chunk in places.keys() - expected:
            part = places[array, chunk]
            lists = part.path / shard_file.file_name(part.shard, self._num_shards)
            self._add(lists, f"lists chunk {chunk} of {array.path}, which has no such chunk")

    def _check_file(self, advance: Advance, placed: tuple[tuple[ChunkedArray, int], Part]) -> tuple[int, bool]:
        """Reads a chunk's file, and compares it with what is known of it.

        Returns its size in bytes, and whether its checksum is known.
        """
        (array, chunk), part = placed
        file = part.path / array.chunk_key(chunk)
        expected = part.held.crc32c(array, chunk)
        size = checksum = 0
        piece = np.empty(PIECE_BYTES, dtype=np.uint8)
        try:
            with file.open("rb", buffering=0) as opened:
                while count := opened.readinto(piece.data):
                    checksum = extend(checksum, piece[:count])
                    size += count
                    advance(count)
        except OSError as error:
            self._add(file, f"cannot be read ({error.strerror})")
        else:
            if array.encoding is None and size != array.chunk_bytes:
                self._add(file, f"has {size} bytes, and the chunk has {array.chunk_bytes}")
            elif expected is not None and checksum != expected:
                self._add(file, f"is damaged: its CRC32C is {checksum:08x}, and it was written with {expected:08x}")
        return size, expected is not None


def _files_below(folder: Path, key: str) -> Iterator[str]:
    """The keys of the files at `key` and in the folders below it."""
    place = folder / key
    if not place.is_dir():
        if place.exists():
            yield key
        return
    for parent, _, names in os.walk(place):
        yield from (str((Path(parent) / name).relative_to(folder)) for name in names)


def _completed(found: object, expected: dict[str, object]) -> object:
    """What an earlier version wrote, with the names of dimensions that it left out."""
    if isinstance(found, dict) and DIMENSIONS in expected:
        return {DIMENSIONS: expected[DIMENSIONS], **found}
    return found


def _difference(found: object, expected: object, place: str = "it") -> str | None:
    """Where two JSON values differ first; None if they do not."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for name in sorted(found.keys() | expected.keys()):
            inner = name if place == "it" else f"{place}.{name}"
            if name not in found or name not in expected:
                return f"{inner} is {'missing' if name in expected else 'too many'}"
            if difference := _difference(found[name], expected[name], inner):
                return difference
        return None
    if type(found) is not type(expected) or found != expected:
        return f"{place} is {_short(found)}, not {_short(expected)}"
    return None


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
