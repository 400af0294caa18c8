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
    """The chunks in a generation's folder on one server, by the path of their array."""

    chunks: Mapping[str, frozenset[int]]

    def __contains__(self, place: tuple[ChunkedArray, int]) -> bool:
        array, chunk = place
        return chunk in self.chunks.get(array.path, ())


def encode(step: int, shard: int, num_shards: int, written: Mapping[ChunkedArray, list[int]]) -> bytes:
    """The file's content. `written` has the chunks of each array that were written."""
    document = {
        "format": FORMAT,
        "step": step,
        "shard": shard,
        "num_shards": num_shards,
        "arrays": {
            array.path: {"chunk_bytes": array.chunk_bytes, "chunks": sorted(chunks)}
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
    return HeldChunks({path: frozenset(arrays.child(path).integers("chunks")) for path in arrays.names()})
