"""The one file of a generation that differs between servers: which chunks this server holds.

It is written last, under a name of its own (`shard-0-of-2.json`), so that servers' folders can be copied
over each other; a folder without it is no complete generation of that server.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ps.store.arrays import ChunkedArray
from ps.store.errors import check_format
from ps.store.fields import Fields

FORMAT = 1


def file_name(shard: int, num_shards: int) -> str:
    return f"shard-{shard}-of-{num_shards}.json"


@dataclass(frozen=True)
class HeldChunks:
    """The chunks in a generation's folder on one server, by the path of their array.

    Each with the CRC32C of its file, or None where the generation was written without.
    """

    chunks: Mapping[str, Mapping[int, int | None]]

    def __contains__(self, place: tuple[ChunkedArray, int]) -> bool:
        array, chunk = place
        return chunk in self.chunks.get(array.path, ())

    def crc32c(self, array: ChunkedArray, chunk: int) -> int | None:
        return self.chunks[array.path][chunk]


def encode(step: int, shard: int, num_shards: int, written: Mapping[ChunkedArray, Mapping[int, int]]) -> bytes:
    """The file's content. `written` has the chunks of each array that were written, and their files' CRC32C."""
    document = {
        "format": FORMAT,
        "step": step,
        "shard": shard,
        "num_shards": num_shards,
        "arrays": {
            array.path: {
                "chunk_bytes": array.chunk_bytes,
                "chunks": sorted(chunks),
                "crc32c": [chunks[chunk] for chunk in sorted(chunks)],
            }
            for array, chunks in written.items()
        },
    }
    return json.dumps(document, sort_keys=True).encode() + b"\n"


def read(folder: Path, step: int, shard: int, num_shards: int, remedy: str) -> HeldChunks:
    """Raises DamagedError or NewerFormatError, naming the file."""
    fields = Fields.of_file(folder / file_name(shard, num_shards), remedy)
    check_format(fields.integer("format", smallest=1), FORMAT, fields.file)
    for name, expected in (("step", step), ("shard", shard), ("num_shards", num_shards)):
        if fields.integer(name) != expected:
            fields.refuse(name, f"is {fields.integer(name)}, and the file's place says {expected}")
    arrays = fields.child("arrays")
    return HeldChunks({path: _checksums(arrays.child(path)) for path in arrays.names()})


def _checksums(array: Fields) -> dict[int, int | None]:
    chunks = array.integers("chunks")
    if "crc32c" not in array.names():
        # Written by a version that had no checksums yet.
        return dict.fromkeys(chunks)
    checksums = array.integers("crc32c", largest=(1 << 32) - 1)
    if len(checksums) != len(chunks):
        array.refuse("crc32c", f"has {len(checksums)} entries for {len(chunks)} chunks")
    return dict(zip(chunks, checksums, strict=True))
