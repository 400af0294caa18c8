"""Data folders of servers in which a tool makes a job that is new, in all of them or in none."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ps.store import DataDir, JobStore, unfinished
from ps.store.errors import disk_errors
from ps.tools.errors import ToolError

_TOOL = "import"


@contextmanager
def new_job(job: str, folders: Sequence[Path]) -> Iterator[list[JobStore]]:
    """The job's stores, of as many servers as there are folders, to be filled by the block.

    No server starts with one of the folders before the block has ended well. If it fails, all of the job is
    removed again. What a run that was killed left is removed first.

    Raises ToolError for a job that is not new, and StoreError for folders that cannot be written or are another
    shard's.
    """
    mark = unfinished.Mark(job, _TOOL)
    with ExitStack() as stack:
        data_dirs = [
            stack.enter_context(DataDir(folder, shard, len(folders), filling=True))
            for shard, folder in enumerate(folders)
        ]
        try:
            stores = dict(zip(folders, (data_dir.job_store(job) for data_dir in data_dirs), strict=True))
        except ValueError as error:
            raise ToolError(str(error)) from error
        _check_new(mark, stores)
        try:
            # All of them before any is filled: a part of a job is of no use.
            for folder in folders:
                with disk_errors(f"begin job {job!r}", folder):
                    unfinished.put(folder, mark)
            for folder in folders:
                with disk_errors(f"remove what was left of job {job!r}", folder):
                    _remove(folder / job)
            yield list(stores.values())
        except BaseException:
            # Where something stays, so does the mark.
            with suppress(OSError):
                for folder in folders:
                    _remove(folder / job)
                    unfinished.clear(folder)
            raise
        for folder in folders:
            unfinished.clear(folder)


def _check_new(mark: unfinished.Mark, stores: Mapping[Path, JobStore]) -> None:
    marks = {folder: unfinished.find(folder) for folder in stores}
    for folder, found in marks.items():
        if found not in (None, mark):
            raise ToolError(
                f"{folder} is being filled with job {found.job!r}; run that 'zero-ps {found.tool}' again first, or "
                "delete the folder"
            )
    # Of a run that was killed while it took the marks away, which had written all of these.
    whole = {key for folder, found in marks.items() if found is not None for key in stores[folder].committed()}
    for folder, store in stores.items():
        keys = [*store.committed(), *store.tags().values()]
        if marks[folder] is None and (others := [key for key in keys if key not in whole]):
            raise ToolError(
                f"job {mark.job!r} has commits in {folder} already ({others[-1]}); choose another --job, or other "
                "folders"
            )


def _remove(job_folder: Path) -> None:
    if job_folder.exists():
        shutil.rmtree(job_folder)
