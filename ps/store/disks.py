"""A server's data folders on several disks: which chunk goes to which, and when their parts make one generation."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from protos.layout import ChunkGrid, place_all

_MARKER = re.compile(r"shard-([0-9]{1,6})-of-([0-9]{1,6})\.disk-([0-9]{1,6})-of-([0-9]{1,6})")


def spread(shapes: Iterable[Sequence[int]], shard: int, num_shards: int, disks: int) -> Mapping[tuple[int, int], int]:
    """The disk of each chunk of a shard, by parameter and chunk.

    Successive chunks go to different disks, and no two disks differ by more than one chunk. A pure function,
    for what is written; what is read lies wherever its folder says.
    """
    bytes_on = [0] * disks
    places: dict[tuple[int, int], int] = {}
    shapes = [tuple(shape) for shape in shapes]
    for parameter, (shape, shards) in enumerate(zip(shapes, place_all(shapes, num_shards), strict=True)):
        grid = ChunkGrid.of(shape)
        for chunk, holder in enumerate(shards):
            if holder == shard:
                disk = min(range(disks), key=bytes_on.__getitem__)
                bytes_on[disk] += grid.chunk_elements(chunk)
                places[parameter, chunk] = disk
    return places


def marker(shard: int, num_shards: int, disk: int, disks: int) -> str:
    """The empty file that says which part of a generation on several disks a folder is."""
    return f"shard-{shard}-of-{num_shards}.disk-{disk}-of-{disks}"


def missing_disks(parts: Iterable[Path], shard: int, num_shards: int) -> list[str]:
    """Which parts of a shard's generation are in none of these folders: "disk 1 of 2". Empty if it is whole."""
    found: dict[int, set[int]] = {}
    for part in parts:
        markers = [m for p in part.glob("shard-*.disk-*") if (m := _MARKER.fullmatch(p.name))]
        own = [(int(m[3]), int(m[4])) for m in markers if (int(m[1]), int(m[2])) == (shard, num_shards)]
        for disk, disks in own or [(0, 1)]:
            found.setdefault(disks, set()).add(disk)
    # Parts of one commit are all of one number of disks.
    return [f"disk {disk} of {disks}" for disks in found for disk in range(disks) if disk not in found[disks]]
