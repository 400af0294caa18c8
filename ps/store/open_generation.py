"""`ps.open_generation`: the whole model as one zarr group, over the folders of all servers."""

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import zarr
from zarr.abc.store import ByteRequest, Store
from zarr.buffer import default_buffer_prototype
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import MemoryStore

from ps.store import attributes
from ps.store.arrays import METADATA_FILE, ChunkedArray, encode_document, group_metadata
from ps.store.bfloat16 import register_bfloat16
from ps.store.checksum import extend
from ps.store.errors import DamagedError
from ps.store.generation_set import GenerationSet, Part, find_generation
from ps.store.union_store import UnionStore

_CHUNK = re.compile(r"([^/]+/[^/]+)/c(?:/(\d{1,18}))?")

_Folders = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def open_generation(folders: _Folders, *, job: str | None = None, step: int | None = None) -> zarr.Group:
    """The whole model at one commit as a read-only zarr group, read from where it is.

    folders: the data folders (`--data-dir`) of all servers of the set, in any order. Folders of the job in
        them, or of single generations, will do too.
    job: which one, where the folders hold several.
    step: None for the newest one that is complete over the folders.

    `group["weight/<name>"]` is a parameter, `group["buffer/<name>"]` a buffer, `group["exp_avg/<name>"]` and
    the like optimizer state, `group.attrs["zero_ps"]` describes the job. State of a chunk that was never
    stepped reads as zeros. Arrays of data type `bfloat16` come as `ml_dtypes.bfloat16` where that package is
    installed, else as their bits in `uint16`.

    Servers may go on running. A generation that they delete (`zero-ps serve --keep`) can be read no longer.

    Raises ps.store.GenerationMissingError if nothing is complete over the folders, DamagedError and
    NewerFormatError for files that are not what they should be; so does reading, for a chunk that is missing,
    too short, or has another checksum than it was written with.
    """
    register_bfloat16()
    named = [folders] if isinstance(folders, (str, os.PathLike)) else folders
    generation = find_generation([Path(folder) for folder in named], job=job, step=step)
    return zarr.open_group(GenerationStore(generation), mode="r", zarr_format=3)


class GenerationStore(UnionStore):
    """The store behind `open_generation`: a union that knows which folder has which chunk.

    A chunk that should be there and is not, or is damaged, raises DamagedError; zarr would show zeros. The group's
    metadata is consolidated: it has the metadata of all arrays, so that none of their files is read.
    """

    def __init__(self, generation: GenerationSet, *, read_only: bool = True) -> None:
        super().__init__(list(dict.fromkeys(part.path for part in generation.parts)), read_only=read_only)
        self._generation = generation
        self._metadata = _metadata(generation)
        self._top = {METADATA_FILE, *(path.split("/")[0] for path in generation.arrays)}
        self._store_of = dict(zip(self.folders, self._stores, strict=True))

    def with_read_only(self, read_only: bool = False) -> Store:
        if not read_only:
            super().with_read_only(read_only)
        return type(self)(self._generation)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        if (place := self._place(key)) is None:
            return await self._metadata.get(key, prototype, byte_range)
        part, array, chunk = place
        file = part.path / key
        try:
            size = file.stat().st_size
            found = await self._store_of[part.path].get(key, prototype, byte_range)
        except OSError as error:
            raise _damaged(file, f"cannot be read ({error.strerror})") from error
        if found is None:
            raise _damaged(file, "was deleted just now")
        if array.encoding is None and size != array.chunk_bytes:
            raise _damaged(file, f"has {size} bytes, and the chunk has {array.chunk_bytes}")
        expected = part.held.crc32c(array, chunk)
        if byte_range is None and expected is not None:
            checksum = await asyncio.to_thread(extend, 0, found.as_numpy_array())
            if checksum != expected:
                raise _damaged(file, f"has the CRC32C {checksum:08x}, and was written with {expected:08x}")
        return found

    async def exists(self, key: str) -> bool:
        return self._place(key) is not None or await self._metadata.exists(key)

    async def getsize(self, key: str) -> int:
        if self._place(key) is None:
            return await self._metadata.getsize(key)
        return await super().getsize(key)

    async def list(self) -> AsyncIterator[str]:
        async for key in super().list():
            if self._is_zarr(key):
                yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        async for key in super().list_prefix(prefix):
            if self._is_zarr(key):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        async for name in super().list_dir(prefix):
            if prefix or self._is_zarr(name):
                yield name

    def __str__(self) -> str:
        header = self._generation.header
        return f"job {header.job!r}, {header.key}, in {len(self.folders)} folders"

    def __eq__(self, other: object) -> bool:
        return (
            super().__eq__(other)
            and isinstance(other, GenerationStore)
            and other._generation.key == self._generation.key
        )

    __hash__ = None

    def _is_zarr(self, key: str) -> bool:
        """Whether it is, or is in, a part of the zarr hierarchy: servers keep other files beside the groups."""
        return key.split("/", maxsplit=1)[0] in self._top

    def _place(self, key: str) -> tuple[Part, ChunkedArray, int] | None:
        """The part that has the chunk of this key, its array and its index; None if that is no chunk that there is."""
        match = _CHUNK.match(key)
        array = self._generation.arrays.get(match[1]) if match else None
        if match is None or array is None:
            return None
        chunk = int(match[2] or 0)
        part = self._generation.part_with(array, chunk)
        return (part, array, chunk) if part is not None and array.chunk_key(chunk) == key else None


def _metadata(generation: GenerationSet) -> MemoryStore:
    """The metadata files, the outermost with all others in it."""
    arrays = {path: json.loads(array.metadata()) for path, array in generation.arrays.items()}
    nodes = {path.split("/")[0]: json.loads(group_metadata({})) for path in arrays} | arrays
    root = json.loads(group_metadata(attributes.encode(generation.header, generation.states)))
    root["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": nodes}
    files = {f"{path}/{METADATA_FILE}": document for path, document in nodes.items()} | {METADATA_FILE: root}
    buffer = default_buffer_prototype().buffer
    return MemoryStore({key: buffer.from_bytes(encode_document(files[key])) for key in files}, read_only=True)


def _damaged(file: Path, what: str) -> DamagedError:
    return DamagedError(
        f"{file} {what}. If its server deleted the generation meanwhile, open a newer one; else 'zero-ps verify' says "
        "what to do"
    )
