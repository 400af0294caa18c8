"""What a command on folders shows of its progress."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from tqdm import tqdm

from protos.sizes import format_bytes

Advance = Callable[[int], object]
"""Told of bytes that are done, since the last call."""

Progress = Callable[[str, int], AbstractContextManager[Advance]]
"""Begins a piece of work, with its name and its size in bytes; it ends with the context."""


@contextmanager
def silent(label: str, total_bytes: int) -> Iterator[Advance]:
    """Shows nothing."""
    yield lambda done: None


@contextmanager
def shown(label: str, total_bytes: int) -> Iterator[Advance]:
    """On stderr: a bar where that is a terminal, else a line when the work begins."""
    if not sys.stderr.isatty():
        print(f"{label}: {format_bytes(total_bytes)}", file=sys.stderr, flush=True)
        yield lambda done: None
        return
    with tqdm(total=total_bytes, desc=label, unit="B", unit_scale=True, file=sys.stderr, leave=False) as bar:
        yield bar.update
