"""Commits of a job that were asked for: which has not begun yet, which is under way, how the last one ended."""

from dataclasses import dataclass

from ps.monitor import Monitor, Patience
from ps.store import CommitKey, Written


@dataclass(eq=False)
class RunningCommit:
    """begun: its state is fixed; updates may go on, chunk by chunk. result: None until it is over."""

    key: CommitKey
    announced: bool
    begun: bool = False
    result: Written | Exception | None = None


class RunningCommits:
    """At most one commit of a job at a time, and the outcome of the last one that was announced."""

    def __init__(self, job: str, monitor: Monitor) -> None:
        self._job = job
        self._monitor = monitor
        self._latest: RunningCommit | None = None

    def add(self, key: CommitKey, patience: Patience, *, announced: bool = False) -> RunningCommit:
        """Waits until the commit before is over. Raises Timeout and Cancelled."""
        with self._monitor:
            self._monitor.wait_until(
                lambda: self._latest is None or self._latest.result is not None,
                patience,
                lambda: f"{self._latest and self._latest.key} of job {self._job!r} to be committed",
            )
            self._latest = RunningCommit(key, announced)
            return self._latest

    def announced(self, key: CommitKey) -> RunningCommit | None:
        """The commit of this key, if it was announced and no other one was asked for since."""
        with self._monitor:
            latest = self._latest
            return latest if latest is not None and latest.announced and latest.key == key else None

    def begin(self, commit: RunningCommit) -> None:
        with self._monitor:
            commit.begun = True
            self._monitor.changed()

    def finish(self, commit: RunningCommit, result: Written | Exception) -> None:
        with self._monitor:
            commit.begun, commit.result = True, result
            self._monitor.changed()

    def outcome(self, commit: RunningCommit, patience: Patience) -> Written:
        """Waits for the end of a commit. Raises what it failed with, Timeout and Cancelled."""
        self._monitor.wait_until(
            lambda: commit.result is not None,
            patience,
            lambda: f"{commit.key} of job {self._job!r} to be committed",
        )
        if isinstance(commit.result, Exception):
            raise commit.result
        assert commit.result is not None
        return commit.result

    def wait_before_change(self, step: int, patience: Patience) -> None:
        """Waits until no commit of `step` is about to begin, so that chunks may be changed. Raises Timeout."""
        self._monitor.wait_until(
            lambda: self._latest is None or self._latest.begun or self._latest.key.step != step,
            patience,
            lambda: f"the commit of step {step} of job {self._job!r} to begin",
        )
