"""That only one process at a time uses a data folder."""

import fcntl
import os
from pathlib import Path

from ps.store.errors import DataDirError

LOCK_FILE = ".lock"


class FolderLock:
    """Held until `close` or the end of the process, however it ends.

    Raises DataDirError if another process holds it: `cannot` says what is not possible then, `remedy` what to
    do. Raises OSError if there can be no lock in the folder.
    """

    def __init__(self, folder: Path, cannot: str, remedy: str) -> None:
        self._file: int | None = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError as error:
            pid = os.pread(self._file, 32, 0).decode(errors="replace").strip()
            self.close()
            by = f"the process with pid {pid}" if pid.isdigit() else "another process"
            raise DataDirError(f"{cannot}: {by} is using it; {remedy}") from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets other processes use the folder."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
