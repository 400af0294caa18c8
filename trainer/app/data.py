"""Training data: the bytes of some files, and batches that depend on nothing but their place.

A batch is a pure function of (seed, step, rank), so a run that goes on from step 120 sees what it would
have seen had it never stopped, and no state of a data loader has to be stored.
"""

import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

DEFAULT_BYTES = 16 << 20
"""How much is read at most: enough that a short run sees nothing twice, little enough to read in a second."""

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "idlelib", "site-packages", "__pycache__"}


def standard_library() -> list[Path]:
    """The source files of Python's own standard library, without tests, sorted by name.

    Every machine that can run the program has this text.
    """
    root = Path(sysconfig.get_path("stdlib"))
    return [path for path in sorted(root.rglob("*.py")) if not _SKIPPED_FOLDERS & set(path.parts)]


def find_files(paths: Iterable[Path]) -> list[Path]:
    """The given files, and all files in the given folders, sorted by name within each folder.

    Raises ValueError for a path that does not exist.
    """
    files = []
    for path in paths:
        if path.is_dir():
            files += [p for p in sorted(path.rglob("*")) if p.is_file()]
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"--data {path}: there is no such file or folder")
    return files


class Corpus:
    """The bytes of files, one after another, a zero byte between two."""

    def __init__(self, data: npt.NDArray[np.uint8]) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    @staticmethod
    def read(files: Sequence[Path], max_bytes: int = DEFAULT_BYTES) -> "Corpus":
        """Reads files in the given order until `max_bytes` are in. Files that cannot be read raise OSError."""
        parts: list[bytes] = []
        left = max_bytes
        for path in files:
            if left <= 0:
                break
            with path.open("rb") as file:
                part = file.read(left) + b"\0"
            parts.append(part)
            left -= len(part)
        return Corpus(np.frombuffer(b"".join(parts), dtype=np.uint8))

    def check(self, context: int) -> None:
        """Raises ValueError when there is not enough data for one sequence."""
        if len(self._data) <= context:
            raise ValueError(
                f"the data has {len(self._data)} bytes; a context of {context} needs at least {context + 1}"
            )

    def batch(self, *, seed: int, step: int, rank: int, size: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of one rank at one step: int64, each (size, context), from random places.

        Targets are the inputs shifted by one byte. Ranks and steps draw independently of each other.
        """
        places = len(self._data) - context
        starts = np.random.default_rng([seed, step, rank]).integers(places, size=size)
        rows = torch.from_numpy(self._data[starts[:, None] + np.arange(context + 1)].astype(np.int64))
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
