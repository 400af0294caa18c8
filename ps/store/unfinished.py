"""The mark on a data folder that a tool is filling with a job. While it is there, no server starts with it:
it would take a part that is missing for a job that is new.
"""

from dataclasses import dataclass
from pathlib import Path

from protos.names import check_job_name
from ps.store import durable
from ps.store.arrays import encode_document
from ps.store.fields import Fields

MARK_FILE = "unfinished.json"

TOOLS = ("reshard", "import")


@dataclass(frozen=True)
class Mark:
    """job: what there is of it in the folder is nothing yet. tool: the command that is to be run again."""

    job: str
    tool: str


def put(folder: Path, mark: Mark) -> None:
    """What there is of the job in this data folder is from now on nothing, until `clear`."""
    durable.replace_file(folder / MARK_FILE, encode_document({"job": mark.job, "tool": mark.tool}))


def clear(folder: Path) -> None:
    (folder / MARK_FILE).unlink(missing_ok=True)
    durable.sync(folder)


def find(folder: Path) -> Mark | None:
    """Who was filling the folder, and with what; None if it has no mark. Raises DamagedError."""
    file = folder / MARK_FILE
    if not file.exists():
        return None
    fields = Fields.of_file(file, "delete it together with what it is about, or choose another folder")
    job = fields.text("job")
    try:
        check_job_name(job)
    except ValueError as error:
        fields.refuse("job", f"is not valid ({error})")
    tool = fields.text("tool")
    if tool not in TOOLS:
        fields.refuse("tool", f"is {tool!r}, not one of {', '.join(TOOLS)}")
    return Mark(job, tool)
