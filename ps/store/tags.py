"""Tags of generations: an empty file `tag-<name>` in each part of one that is to be kept."""

from collections.abc import Iterable
from pathlib import Path

from ps.store import durable
from ps.store.generations_on_disks import Generation, GenerationsOnDisks

_PREFIX = "tag-"


def write(folder: Path, tag: str) -> None:
    """Tags one part, if it is not tagged yet. The caller syncs the folder."""
    if not (folder / f"{_PREFIX}{tag}").exists():
        durable.write_file(folder / f"{_PREFIX}{tag}", b"")


def in_folders(parts: Iterable[Path]) -> list[str]:
    """Tags that one of the folders has."""
    return sorted({path.name.removeprefix(_PREFIX) for part in parts for path in part.glob(f"{_PREFIX}*")})


def of(generation: Generation) -> list[str]:
    """Tags that a part of the generation has."""
    return in_folders(generation.parts)


def holders(disks: GenerationsOnDisks) -> dict[str, Generation]:
    """By tag, the generation that it keeps. What is in place counts for more than what was abandoned."""
    return {tag: generation for generation in (*disks.abandoned(), *disks.find()) for tag in of(generation)}


def take_away(disks: GenerationsOnDisks, generation: Generation, tag: str) -> None:
    """What was abandoned and has no other goes. Raises OSError."""
    for part in generation.parts:
        (part / f"{_PREFIX}{tag}").unlink(missing_ok=True)
        durable.sync(part)
    if generation in disks.abandoned() and not of(generation):
        disks.remove([generation])


def settle(disks: GenerationsOnDisks, step: int) -> None:
    """Takes tags away that a later generation got, up to the step of one that all servers have. Raises OSError."""
    candidates = [*disks.abandoned(), *(generation for generation in disks.find() if generation.step <= step)]
    holder = {tag: generation for generation in candidates for tag in of(generation)}
    for generation in candidates:
        for tag in of(generation):
            if holder[tag] != generation:
                take_away(disks, generation, tag)
