"""What can go wrong with stored state. Every message says what, why, and what to do."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class StoreError(Exception):
    """A data folder or a generation cannot be read or written."""


class DataDirError(StoreError):
    """The data folder cannot be this server's: not writable, in use, or of another shard."""


class NewerFormatError(StoreError):
    """The folder was written by a newer version of zero-ps."""


class GenerationMissingError(StoreError):
    """The job has no generation of this step."""


class DamagedError(StoreError):
    """A file is missing, has the wrong size, or holds what it should not."""


class DiskFullError(StoreError):
    """There was no room for a generation. Earlier generations are untouched."""


GO_BACK = "put it back from a copy, or move its generation's folder away on every server to go back to the one before"
"""What to do about a damaged file of a generation where nothing more is known."""

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def disk_errors(what: str, folder: Path) -> Iterator[None]:
    """Turns an OSError of the block into a StoreError that says what could not be done, and where."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in FULL:
            raise DiskFullError(
                f"cannot {what}: the disk of {folder} is full ({reason}); committed generations are "
                "untouched, so free some space and try again"
            ) from error
        raise StoreError(
            f"cannot {what} in {error.filename or folder}: {reason}; committed generations are untouched, so check "
            "that the folder is writable and its disk healthy, and try again"
        ) from error


def check_format(found: int, newest: int, file: Path) -> None:
    """Raises NewerFormatError if `found` is a format that this version cannot read."""
    if found > newest:
        raise NewerFormatError(
            f"{file} has format {found}, and this version of zero-ps reads formats up to {newest}; "
            "use the version that wrote it, or a newer one"
        )
