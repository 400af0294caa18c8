"""Files and folders that survive a crash: written, synced, and only then given their name."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterable
from concurrent.futures import Executor
from pathlib import Path

FOLDER_MODE = 0o700
"""Folders are the owner's alone: weights and gradients are nobody else's business."""

_NO_LINKS = (errno.EXDEV, errno.EMLINK, errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP)
"""Why a file cannot be linked here and has to be copied: another file system, too many links, none at all."""


def sync(path: Path | str) -> None:
    """Waits until a file's bytes, or a folder's entries, are on the disk. An OSError names it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(fd)


def write_file(path: Path, data: bytes) -> None:
    """Writes a new file and syncs it. The caller syncs the folder."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file so that at any instant the old content or the new one is there."""
    beside = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    write_file(beside, data)
    os.replace(beside, path)
    sync(path.parent)


def make_folders(path: Path) -> None:
    """Creates a folder and its missing parents with mode 0700, each entry synced."""
    if path.is_dir():
        return
    make_folders(path.parent)
    path.mkdir(mode=FOLDER_MODE, exist_ok=True)
    sync(path.parent)


def sync_folders(root: Path, executor: Executor) -> None:
    """Syncs every folder below `root`, and `root`."""
    drain(executor.map(sync, [folder for folder, _, _ in os.walk(root)]))


def write_files(files: Iterable[tuple[Path, bytes]], executor: Executor) -> Iterable[None]:
    """Begins to write and sync many small files, several at once; `drain` the result to wait for the end."""
    return executor.map(lambda file: write_file(*file), files)


def temporary_name(folder: Path, why: str = "") -> Path:
    """A new name beside `folder` that `is_temporary` recognises."""
    return folder.with_name(f".{folder.name.lstrip('.')}.tmp-{why}{secrets.token_hex(4)}")


def is_temporary(name: str) -> bool:
    return name.startswith(".") and ".tmp-" in name


def remove_folder(folder: Path) -> None:
    """Deletes a folder. Interrupted at any instant, it is whole or has a temporary name."""
    doomed = temporary_name(folder)
    folder.rename(doomed)
    sync(folder.parent)
    shutil.rmtree(doomed)


def link_or_copy(source: Path | str, target: Path | str) -> bool:
    """Gives a file a second name; where that cannot be, copies it. Returns whether it was linked.

    Raises OSError. A copy is not synced.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(source, target)
        return False
    return True


def drain(results: Iterable[None]) -> None:
    """Waits for all of them. Raises the first error."""
    for _ in results:
        pass
