"""A server's data folder: whose it is, and that only one process uses it."""

import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

from protos.names import check_job_name
from ps.store import durable, unfinished
from ps.store.arrays import encode_document
from ps.store.errors import DataDirError, check_format
from ps.store.fields import Fields
from ps.store.folder_lock import FolderLock
from ps.store.job_store import GENERATIONS, WORKING, JobStore

FORMAT = 1
CLAIM_FILE = "zero-ps.json"


class DataDir:
    """The data folder of one server, claimed for shard `shard` of `num_shards`.

    Opening creates the folder (mode 0700) and the file `zero-ps.json` that tells whose it is, and locks it
    until `close` or the end of the process, however it ends.

    filling: for the tools that fill the folder, which do not mind that it is not finished.

    Raises DataDirError, NewerFormatError or DamagedError.
    """

    def __init__(self, path: Path, shard: int, num_shards: int, *, filling: bool = False) -> None:
        if not 0 <= shard < num_shards:
            raise ValueError(f"there is no shard {shard} of {num_shards}: shards count from 0")
        self.path = Path(path).absolute()
        self._shard = shard
        self._num_shards = num_shards
        self._cannot = f"shard {shard}/{num_shards} cannot open {self.path}"
        self._lock: FolderLock | None = None
        try:
            durable.make_folders(self.path)
            remedy = "stop that server, or choose another --data-dir"
            self._lock = FolderLock(self.path, self._cannot, remedy)
            self._claim()
            if not filling:
                self._check_finished()
        except OSError as error:
            self.close()
            raise self._unusable(error) from error
        except BaseException:
            self.close()
            raise

    def jobs(self) -> list[str]:
        """The names of the jobs that have something here."""
        folders = (p for p in self.path.iterdir() if (p / GENERATIONS).is_dir())
        return sorted(folder.name for folder in folders if _is_job_name(folder.name))

    def empty_working(self) -> None:
        """Removes what a former process could not hold in memory. For the start of a server. Raises OSError."""
        for folder in self.path.iterdir():
            if _is_job_name(folder.name) and (folder / WORKING).is_dir():
                shutil.rmtree(folder / WORKING)
                if not any(folder.iterdir()):
                    # A job that was never committed.
                    folder.rmdir()

    def job_store(self, name: str) -> JobStore:
        """The store of one job, which need not exist yet. ValueError for a name that no job may have."""
        if name == CLAIM_FILE:
            raise ValueError(f"job name {name!r} is not valid: the data folder has a file of that name")
        return JobStore(self.path, name, self._shard, self._num_shards)

    def close(self) -> None:
        """Lets other processes use the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _claim(self) -> None:
        claimed = read_claim(self.path)
        if claimed is None:
            claim = {"format": FORMAT, "shard": self._shard, "num_shards": self._num_shards}
            durable.replace_file(self.path / CLAIM_FILE, encode_document(claim))
            return
        shard, num_shards = claimed
        if (shard, num_shards) != (self._shard, self._num_shards):
            jobs = self.jobs()
            of_jobs = " of " + ", ".join(f"job {job!r}" for job in jobs[:3]) if jobs else ""
            raise DataDirError(
                f"{self._cannot}: it holds shard {shard}/{num_shards}{of_jobs}; start it with "
                f"--shard {shard}/{num_shards}, choose another --data-dir, or run 'zero-ps reshard'"
            )

    def _check_finished(self) -> None:
        if job := unfinished.marked_job(self.path):
            raise DataDirError(
                f"{self._cannot}: 'zero-ps reshard' has not finished filling it with job {job!r}; run that again, or "
                "choose another --data-dir"
            )

    def _unusable(self, error: OSError) -> DataDirError:
        return DataDirError(
            f"{self._cannot}: {error.strerror or error}; choose a --data-dir in which this user may create "
            "files and folders"
        )


def read_claim(folder: Path) -> tuple[int, int] | None:
    """Whose data folder this is, as (shard, num_shards); None if it is nobody's.

    Raises DamagedError or NewerFormatError.
    """
    file = folder / CLAIM_FILE
    if not file.exists():
        return None
    fields = Fields.of_file(file, "put back the file, or choose another folder")
    check_format(fields.integer("format", smallest=1), FORMAT, file)
    num_shards = fields.integer("num_shards", smallest=1)
    return fields.integer("shard", largest=num_shards - 1), num_shards


def _is_job_name(name: str) -> bool:
    try:
        check_job_name(name)
    except ValueError:
        return False
    return True
