"""The demo's folder: what is where in it, whose it is, and that one demo at a time uses it."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ps.store.folder_lock import LOCK_FILE


class DemoError(Exception):
    """Why the demo ended, for the person who started it, and with which exit status."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Paths:
    """What is where in the demo's folder."""

    out: Path

    @property
    def marker(self) -> Path:
        """Says that the folder is the demo's, so that --fresh never deletes anything else.

        A running demo holds a lock on it. It stays where it is for as long as the folder does: a lock on a
        file that was deleted would keep nobody out.
        """
        return self.out / ".zero-ps-demo"

    @property
    def state(self) -> Path:
        return self.out / "state"

    @property
    def log(self) -> Path:
        """One line for each step since the job began."""
        return self.out / "loss.jsonl"

    @property
    def trainer_summary(self) -> Path:
        return self.out / "trainers.json"

    @property
    def summary(self) -> Path:
        return self.out / "summary.json"

    @property
    def plot(self) -> Path:
        return self.out / "loss.png"

    def trainer_log(self, rank: int) -> Path:
        return self.out / f"trainer-{rank}.log"


@contextmanager
def claimed(paths: Paths, *, fresh: bool, servers: int | None) -> Iterator[int]:
    """Makes the folder this demo's until the block ends; gives the number of servers that it is for.

    fresh: delete what an earlier demo left. servers: None for as many as the folder was made with, or two.

    Raises DemoError for a folder that is not a demo's, that another one is using, or that cannot be used.
    """
    try:
        marker = _lock(paths)
    except OSError as error:
        raise _unusable(paths, error) from error
    try:
        try:
            if fresh:
                _clear(paths)
                os.ftruncate(marker, 0)
            number = _servers(paths, marker, servers)
        except OSError as error:
            raise _unusable(paths, error) from error
        yield number
    finally:
        os.close(marker)


def _unusable(paths: Paths, error: OSError) -> DemoError:
    return DemoError(f"cannot use {paths.out}: {error.strerror or error}; choose another folder with --out", status=2)


def _lock(paths: Paths) -> int:
    """The marker, open and locked, in a folder that is there."""
    if paths.out.exists() and not paths.out.is_dir():
        raise DemoError(f"--out {paths.out} is not a folder", status=2)
    if paths.out.exists() and any(paths.out.iterdir()) and not paths.marker.is_file():
        raise DemoError(
            f"{paths.out} was not made by this demo (it has no {paths.marker.name}) and is left alone; choose "
            "another folder with --out",
            status=2,
        )
    paths.out.mkdir(parents=True, exist_ok=True)
    marker = os.open(paths.marker, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(marker)
        raise DemoError(
            f"a demo is running in {paths.out} already; stop that one, or choose another folder with --out", status=2
        ) from None
    except BaseException:
        os.close(marker)
        raise
    return marker


def _clear(paths: Paths) -> None:
    """Deletes what is in the folder but the marker, unless a server that somebody started by hand is using it."""
    with ExitStack() as stack:
        for path in paths.state.glob(f"*/{LOCK_FILE}"):
            lock = stack.enter_context(path.open("rb"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DemoError(
                    f"a server is using {path.parent}, so --fresh deletes nothing; stop that server first", status=2
                ) from None
        for path in paths.out.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != paths.marker:
                path.unlink()


def _servers(paths: Paths, marker: int, wanted: int | None) -> int:
    """What the marker says; writes it where it says nothing yet."""
    text = os.pread(marker, 1 << 16, 0)
    if not text:
        number = wanted or 2
        os.pwrite(marker, json.dumps({"servers": number}).encode() + b"\n", 0)
        return number
    try:
        number = json.loads(text)["servers"]
        damaged = type(number) is not int or number < 1
    except (ValueError, TypeError, KeyError):
        damaged = True
    if damaged:
        raise DemoError(f"{paths.marker} is damaged; start over with --fresh", status=2)
    if wanted not in (None, number):
        raise DemoError(
            f"{paths.out} was made with --servers {number}; go on with as many, or start over with --fresh", status=2
        )
    return int(number)
