"""A server's data folders: whose they are, and that only one process uses them."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from protos.names import check_job_name
from ps.store import durable, unfinished
from ps.store.claim import CLAIM_FILE, Claim
from ps.store.errors import DataDirError
from ps.store.folder_lock import FolderLock
from ps.store.job_store import GENERATIONS, WORKING, JobStore


class DataDir:
    """The data folder of one server, or its folders on several disks, claimed for shard `shard` of `num_shards`.

    Opening creates the folders (mode 0700) and in each the file `zero-ps.json` that tells whose it is, and
    locks them until `close` or the end of the process, however it ends. Folders may be added to those that a
    server has, and none left out; their order does not matter.

    filling: for the tools that fill the folder, which do not mind that it is not finished.
    paths: the folders in the order of their disks. path: the first.

    Raises DataDirError, NewerFormatError or DamagedError.
    """

    def __init__(self, paths: Path | Sequence[Path], shard: int, num_shards: int, *, filling: bool = False) -> None:
        if not 0 <= shard < num_shards:
            raise ValueError(f"there is no shard {shard} of {num_shards}: shards count from 0")
        self._shard = shard
        self._num_shards = num_shards
        self._locks: list[FolderLock] = []
        folders = [Path(path).absolute() for path in ([paths] if isinstance(paths, Path) else paths)]
        try:
            for folder in folders:
                self._open(folder)
            self.paths = self._claimed(folders)
            if not filling:
                self._check_finished()
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> Path:
        return self.paths[0]

    def jobs(self) -> list[str]:
        """The names of the jobs that have something here."""
        return sorted({name for path in self.paths for name in _jobs_in(path)})

    def empty_working(self) -> None:
        """Removes what a former process could not hold in memory. For the start of a server. Raises OSError."""
        for folder in [folder for path in self.paths for folder in path.iterdir()]:
            if _is_job_name(folder.name) and (folder / WORKING).is_dir():
                shutil.rmtree(folder / WORKING)
                if not any(folder.iterdir()):
                    # A job that was never committed.
                    folder.rmdir()

    def job_store(self, name: str) -> JobStore:
        """The store of one job, which need not exist yet. ValueError for a name that no job may have."""
        if name == CLAIM_FILE:
            raise ValueError(f"job name {name!r} is not valid: the data folder has a file of that name")
        return JobStore(self.paths, name, self._shard, self._num_shards)

    def close(self) -> None:
        """Lets other processes use the folders."""
        while self._locks:
            self._locks.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self, folder: Path) -> None:
        """Creates and locks a folder."""
        remedy = "stop that server, or choose another --data-dir"
        try:
            durable.make_folders(folder)
            self._locks.append(FolderLock(folder, self._cannot(folder), remedy))
        except OSError as error:
            raise self._unusable(folder, error) from error

    def _check_finished(self) -> None:
        for folder in self.paths:
            if mark := unfinished.find(folder):
                raise DataDirError(
                    f"{self._cannot(folder)}: 'zero-ps {mark.tool}' has not finished filling it with job "
                    f"{mark.job!r}; run that again, or choose another --data-dir"
                )

    def _claimed(self, folders: Sequence[Path]) -> tuple[Path, ...]:
        """The folders in the order of their disks, each of which says so itself."""
        claims = {folder: Claim.read(folder) for folder in folders}
        known = {folder: claim for folder, claim in claims.items() if claim is not None}
        for folder, claim in known.items():
            if (claim.shard, claim.num_shards) != (self._shard, self._num_shards):
                jobs = _jobs_in(folder)
                of_jobs = " of " + ", ".join(f"job {job!r}" for job in jobs[:3]) if jobs else ""
                raise DataDirError(
                    f"{self._cannot(folder)}: it holds shard {claim.shard}/{claim.num_shards}{of_jobs}; start it with "
                    f"--shard {claim.shard}/{claim.num_shards}, choose another --data-dir, or run 'zero-ps reshard'"
                )
        by_disk: dict[int, Path] = {}
        for folder, claim in known.items():
            if by_disk.setdefault(claim.disk, folder) != folder:
                raise DataDirError(
                    f"{self._cannot(folder)} beside {by_disk[claim.disk]}: both are disk {claim.disk} of a server; "
                    "name the folders of one server"
                )
        for folder, claim in known.items():
            if missing := [disk for disk in range(claim.disks) if disk not in by_disk]:
                raise DataDirError(
                    f"{self._cannot(folder)}: it is disk {claim.disk} of {claim.disks} of this server, and disk "
                    f"{missing[0]} was not named; name all of them, each with --data-dir"
                )
        new = [folder for folder in folders if folder not in known]
        for folder in new:
            by_disk[len(by_disk)] = folder
        ordered = tuple(by_disk[disk] for disk in range(len(by_disk)))
        # New ones first: a crash in between leaves those that were there as they are.
        for disk, folder in sorted(enumerate(ordered), key=lambda place: place[1] not in new):
            claim = Claim(self._shard, self._num_shards, disk, len(ordered))
            if claims[folder] != claim:
                try:
                    claim.write(folder)
                except OSError as error:
                    raise self._unusable(folder, error) from error
        return ordered

    def _cannot(self, folder: Path) -> str:
        return f"shard {self._shard}/{self._num_shards} cannot open {folder}"

    def _unusable(self, folder: Path, error: OSError) -> DataDirError:
        return DataDirError(
            f"{self._cannot(folder)}: {error.strerror or error}; choose a --data-dir in which this user may create "
            "files and folders"
        )


def _jobs_in(folder: Path) -> list[str]:
    jobs = (p for p in folder.iterdir() if (p / GENERATIONS).is_dir())
    return sorted(job.name for job in jobs if _is_job_name(job.name))


def _is_job_name(name: str) -> bool:
    try:
        check_job_name(name)
    except ValueError:
        return False
    return True
