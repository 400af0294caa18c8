"""Which folders are generations: `00000120`, and `.00000120.replaced-1` once that step was committed again.

A replaced generation stays until a commit that supersedes it is known to be on all servers, so that at any
instant there is one that all of them have.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ps.store import durable

_IN_PLACE = re.compile(r"[0-9]{8,18}")
_REPLACED = re.compile(r"\.([0-9]{8,18})\.replaced-([1-9][0-9]{0,17})")


@dataclass(frozen=True)
class GenerationFolder:
    """number: counts the replaced generations of a step, as they were replaced; None for the one in place."""

    step: int
    number: int | None
    path: Path


def in_place(folder: Path, step: int) -> Path:
    """Where in the folder of a job's generations the one of a step is."""
    return folder / f"{step:08d}"


def find(folder: Path, own_file: str) -> list[GenerationFolder]:
    """The generations that have the file which completes them, by step; of one step the newest last."""
    return [generation for generation in find_all(folder) if (generation.path / own_file).is_file()]


def find_all(folder: Path) -> list[GenerationFolder]:
    """What has a generation's name, in the order of `find`."""
    return sorted(_all(folder), key=lambda g: (g.step, g.number is None, g.number or 0))


def set_aside(folder: Path, step: int) -> None:
    """Makes the generation in place a replaced one. The caller puts another in place, and syncs."""
    numbers = [g.number or 0 for g in _all(folder) if g.step == step]
    in_place(folder, step).rename(folder / f".{step:08d}.replaced-{max(numbers) + 1}")


def put_back(folder: Path) -> None:
    """Where a step has replaced generations and none in place, puts the newest of them in place."""
    found = list(_all(folder))
    missing = {g.step for g in found} - {g.step for g in found if g.number is None}
    for step in missing:
        newest = max((g for g in found if g.step == step), key=lambda g: g.number or 0)
        newest.path.rename(in_place(folder, step))
    if missing:
        durable.sync(folder)


def _all(folder: Path) -> Iterator[GenerationFolder]:
    for path in folder.iterdir() if folder.is_dir() else ():
        if not path.is_dir():
            continue
        if _IN_PLACE.fullmatch(path.name) and f"{int(path.name):08d}" == path.name:
            yield GenerationFolder(int(path.name), None, path)
        elif match := _REPLACED.fullmatch(path.name):
            yield GenerationFolder(int(match[1]), int(match[2]), path)
