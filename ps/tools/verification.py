"""Whether commits are whole: everything that a generation's files say is compared with what is there."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ps.store import unfinished
from ps.store.claim import CLAIM_FILE, read_claim
from ps.store.contents import CommitKey
from ps.store.errors import StoreError
from ps.store.generation_set import complete_keys, missing_parts, nothing_complete, of_one_job
from ps.store.locate import FoundFolder, find_folders
from ps.tools.generation_check import GenerationReport, Problem, check_generation
from ps.tools.progress import Progress, silent

_ATTEMPTS = 5
"""Times that the newest generation may be deleted while it is read."""


@dataclass
class Report:
    """What `verify` found.

    generations: those that were checked, the newest last.
    others: problems of what could not be checked.
    notes: what is no problem and worth knowing, such as a commit that not all servers have.
    """

    generations: list[GenerationReport] = field(default_factory=list)
    others: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[Problem]:
        return [*self.others, *(problem for generation in self.generations for problem in generation.problems)]

    @property
    def ok(self) -> bool:
        """At least one generation was checked, and nothing is wrong."""
        return bool(self.generations) and not self.problems


def verify(
    folders: Sequence[Path],
    *,
    job: str | None = None,
    step: int | None = None,
    all_steps: bool = False,
    progress: Progress = silent,
) -> Report:
    """Checks the newest generation that is complete over `folders`, or the one of `step`, or every one.

    folders, job: as for `find_generation`.

    Only reads, and takes no lock: servers may run. What they delete meanwhile is no problem; another generation
    is checked in its place. Raises GenerationMissingError for a folder that holds nothing of the kind, and for
    several jobs.
    """
    for _ in range(_ATTEMPTS):
        found = of_one_job(find_folders(folders, job))
        report = _verify(folders, found, step, all_steps, progress)
        if report.generations or find_folders(folders, job) == found:
            return report
    what = f"has a server that deleted {_ATTEMPTS} generations while they were read; start it with a larger --keep"
    return Report(others=[Problem(folders[0], what)])


def _verify(
    folders: Sequence[Path], found: list[FoundFolder], step: int | None, all_steps: bool, progress: Progress
) -> Report:
    report = Report()
    wanted = [folder for folder in found if step in (None, folder.key.step)]
    complete = complete_keys(wanted)
    chosen = complete if all_steps else complete[-1:]
    oldest = chosen[0][0].step if chosen else -1
    if not chosen:
        report.others.append(Problem(folders[0], nothing_complete(found, step)))
    report.others += _wrong_claims(found)
    report.notes += _unfinished(found)
    for folder in found:
        newer = folder in wanted and folder.replaced is None and folder.key.step >= oldest
        # Of one that was named by itself not even the step need be known.
        if folder.problem is not None and (newer or folder.path == folder.root):
            report.others.append(Problem(folder.path, folder.problem))
    if chosen:
        report.notes += _incomplete(wanted, complete, oldest)
    for key, num_shards in chosen:
        parts = [f for f in wanted if f.key == key and num_shards in {of for _, of in f.shards}]
        others = [other.step for other, _ in complete_keys(found) if other.step != key.step]
        checked = check_generation(parts, key, num_shards, _remedy(key.step, others), progress)
        if checked.problems and not all(part.is_there for part in parts):
            report.notes.append(f"{key} was deleted while it was read")
        else:
            report.generations.append(checked)
    return report


def _wrong_claims(found: Sequence[FoundFolder]) -> Iterator[Problem]:
    """Data folders of which their own server would not find what is in them."""
    for root in dict.fromkeys(folder.root for folder in found):
        try:
            claimed = read_claim(root)
        except StoreError as error:
            yield Problem(root / CLAIM_FILE, str(error))
            continue
        held = {shard for folder in found if folder.root == root for shard in folder.shards}
        if claimed is not None and held and claimed not in held:
            of = ", ".join(f"{shard}/{num_shards}" for shard, num_shards in sorted(held))
            what = (
                f"says shard {claimed[0]}/{claimed[1]}, and what is in the folder is of shard {of}; put the file back"
            )
            yield Problem(root / CLAIM_FILE, what)


def _unfinished(found: Sequence[FoundFolder]) -> Iterator[str]:
    for root in dict.fromkeys(folder.root for folder in found):
        try:
            mark = unfinished.find(root)
        except StoreError as error:
            yield str(error)
            continue
        if mark is not None:
            yield f"{root} is being filled by 'zero-ps {mark.tool}', or it was interrupted: run it again"


def _remedy(step: int, others: Sequence[int]) -> str:
    go_back = f", or go back to step {others[-1]} by moving step {step} away on every server" if others else ""
    return f"put it back from a copy{go_back}"


def _incomplete(found: Sequence[FoundFolder], complete: Sequence[tuple[CommitKey, int]], oldest: int) -> list[str]:
    """Says which commits that are not older than the oldest that is checked are not complete, and what they lack."""
    commits = dict.fromkeys((f.key, of) for f in found if f.problem is None for _, of in f.shards)
    return [
        f"{key} lacks {', '.join(missing_parts(found, key, num_shards))}: it is a commit that is going on, or one that "
        "was interrupted"
        for key, num_shards in commits
        if (key, num_shards) not in complete and key.step >= oldest
    ]
