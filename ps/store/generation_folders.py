"""Which folders are generations, on one disk: by their names alone.

`00000120`, `.00000120.replaced-1` once that step was committed again, and `.00000120.abandoned-1` for what only
a tag keeps: nothing goes on from it by itself. A replaced generation stays until a commit that supersedes it is
known to be on all servers, so that at any instant there is one that all of them have.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_IN_PLACE = re.compile(r"[0-9]{8,18}")
_ASIDE = re.compile(r"\.([0-9]{8,18})\.(replaced|abandoned)-([1-9][0-9]{0,17})")

Aside = Literal["replaced", "abandoned"]


@dataclass(frozen=True)
class GenerationFolder:
    """number: counts the replaced generations of a step, as they were replaced; None for the one in place."""

    step: int
    number: int | None
    path: Path


def in_place(folder: Path, step: int) -> Path:
    """Where in the folder of a job's generations the one of a step is."""
    return folder / f"{step:08d}"


def aside(folder: Path, step: int, kind: Aside, number: int) -> Path:
    """Where one is that is not in place."""
    return folder / f".{step:08d}.{kind}-{number}"


def find_all(folder: Path) -> list[GenerationFolder]:
    """What has a generation's name, by step; of one step the newest last. Not what was abandoned."""
    found = [generation for generation, kind in _all(folder) if kind != "abandoned"]
    return sorted(found, key=lambda g: (g.step, g.number is None, g.number or 0))


def find_abandoned(folder: Path) -> list[GenerationFolder]:
    """What is kept by a tag alone, by step and number."""
    found = [generation for generation, kind in _all(folder) if kind == "abandoned"]
    return sorted(found, key=lambda g: (g.step, g.number or 0))


def _all(folder: Path) -> Iterator[tuple[GenerationFolder, Aside | None]]:
    for path in folder.iterdir() if folder.is_dir() else ():
        if not path.is_dir():
            continue
        if _IN_PLACE.fullmatch(path.name) and f"{int(path.name):08d}" == path.name:
            yield GenerationFolder(int(path.name), None, path), None
        elif match := _ASIDE.fullmatch(path.name):
            kind: Aside = "replaced" if match[2] == "replaced" else "abandoned"
            yield GenerationFolder(int(match[1]), int(match[3]), path), kind
