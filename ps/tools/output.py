"""A folder that a command creates: it has its name once everything in it is written, or never."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ps.store import durable
from ps.tools.errors import ToolError


@contextmanager
def new_folder(path: Path, *, foreign: Callable[[Path], str | None] | None) -> Iterator[Path]:
    """A folder to write into, which is renamed to `path` when the block ends, and removed when it raises.

    foreign: names something in an existing folder that the command did not write, if there is such. A folder
        where there is none is replaced; so one that was named by mistake is not lost. None to replace nothing.

    Raises ToolError if `path` exists and must not be replaced, or where nothing can be created.
    """
    path = path.absolute()
    check_free(path, foreign)
    temporary = durable.temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise ToolError(f"cannot create {path}: {error.strerror}; choose another --out") from error
    try:
        yield temporary
        durable.sync(temporary)
        # Again: there was time for others to create it.
        check_free(path, foreign)
        old = durable.temporary_name(path) if path.exists() else None
        if old is not None:
            path.rename(old)
        try:
            temporary.rename(path)
        except BaseException:
            if old is not None:
                old.rename(path)
            raise
        durable.sync(path.parent)
        if old is not None:
            shutil.rmtree(old)
    except BaseException:
        with suppress(OSError):
            shutil.rmtree(temporary)
        raise


def check_free(path: Path, foreign: Callable[[Path], str | None] | None) -> None:
    """Raises ToolError unless `path` does not exist or is a folder of which nothing else is lost."""
    if not path.exists() and not path.is_symlink():
        return
    if foreign is None:
        raise ToolError(f"{path} exists; choose another --out, or add --overwrite to replace it")
    if path.is_symlink() or not path.is_dir():
        raise ToolError(f"{path} is not a folder, and --overwrite replaces only those; choose another --out")
    if other := foreign(path):
        raise ToolError(
            f"{path} holds {other!r}, which no export wrote, so --overwrite leaves it alone; choose another --out, or "
            "remove the folder yourself"
        )
