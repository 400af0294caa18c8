"""The mark on a data folder that a tool is filling with a job. While it is there, no server starts with it:
it would take a part that is missing for a job that is new.
"""

from pathlib import Path

from protos.names import check_job_name
from ps.store import durable
from ps.store.arrays import encode_document
from ps.store.fields import Fields

MARK_FILE = "unfinished.json"


def mark(folder: Path, job: str) -> None:
    """What there is of `job` in this data folder is from now on nothing, until `clear`."""
    durable.replace_file(folder / MARK_FILE, encode_document({"job": job}))


def clear(folder: Path) -> None:
    (folder / MARK_FILE).unlink()
    durable.sync(folder)


def marked_job(folder: Path) -> str | None:
    """The job with which the folder was being filled; None if it has no mark. Raises DamagedError."""
    file = folder / MARK_FILE
    if not file.exists():
        return None
    fields = Fields.of_file(file, "delete it together with what it is about, or choose another folder")
    job = fields.text("job")
    try:
        check_job_name(job)
    except ValueError as error:
        fields.refuse("job", f"is not valid ({error})")
    return job
