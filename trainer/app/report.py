"""What rank 0 shows and writes while it trains: a progress bar or lines, a JSON log, a summary."""

import json
import os
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

SMOOTHED_STEPS = 10
"""The reported loss is the mean of this many steps: that of one small batch says little."""

LINE_SECONDS = 10.0
"""How often a line is printed where there is no terminal to draw a bar on."""


@dataclass(frozen=True)
class StepReport:
    """One step of the whole job.

    step: how many steps the job had made when this one ended.
    loss: mean over ranks, nats per byte. seconds: of rank 0.
    bytes_pulled, bytes_pushed: of all trainers during this step.
    """

    step: int
    loss: float
    seconds: float
    bytes_pulled: int
    bytes_pushed: int


class Report:
    """Takes one `StepReport` after another. Where `shown` is false it only keeps the numbers."""

    def __init__(self, *, first_step: int, steps: int, log: Path | None, shown: bool) -> None:
        self.first_loss: float | None = None
        self.last_step = first_step
        self._recent: deque[StepReport] = deque(maxlen=SMOOTHED_STEPS)
        self._steps = steps
        self._path = log
        self._shown = shown
        self._last_line = 0.0
        self._log = _open_log(log, first_step) if log is not None and shown else None
        self._bar = _make_bar(first_step, steps) if shown and sys.stderr.isatty() else None

    @property
    def loss(self) -> float | None:
        """The mean loss of the last few steps; None before the first."""
        if not self._recent:
            return None
        return sum(report.loss for report in self._recent) / len(self._recent)

    def step(self, report: StepReport) -> None:
        self.first_loss = report.loss if self.first_loss is None else self.first_loss
        self.last_step = report.step
        self._recent.append(report)
        if self._log is not None:
            self._log.write(json.dumps(asdict(report)) + "\n")
            self._log.flush()
        if self._bar is not None:
            self._bar.set_postfix_str(self._numbers(), refresh=False)
            self._bar.update()
        elif self._shown:
            now = time.monotonic()
            if now - self._last_line >= LINE_SECONDS or report.step == self._steps:
                self._last_line = now
                say(f"step {report.step}/{self._steps}  {self._numbers()}")

    def rewind(self, step: int) -> None:
        """The job goes on at this step, which it or a later one may have made before."""
        if step >= self.last_step:
            return
        self.last_step = step
        self._recent.clear()
        if self._log is not None and self._path is not None:
            self._log.close()
            self._log = _open_log(self._path, step)
        if self._bar is not None:
            self._bar.n = step
            self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._log is not None:
            self._log.close()

    def _numbers(self) -> str:
        seconds = sum(report.seconds for report in self._recent) / len(self._recent)
        moved = sum(report.bytes_pulled + report.bytes_pushed for report in self._recent) / len(self._recent)
        return f"loss {self.loss:.3f}, {seconds:.2f} s/step, {moved / seconds / 1e6:.0f} MB/s moved"


def say(text: str) -> None:
    """A line for the person at the terminal, apart from results on standard output."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(summary, indent=2) + "\n")


def read_log(path: Path) -> list[StepReport]:
    """The steps that a log holds. A last line that was cut off by a crash is left out."""
    reports = []
    for line in path.read_text().splitlines():
        try:
            reports.append(StepReport(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return reports


def _make_bar(first_step: int, steps: int) -> "tqdm[NoReturn]":
    # A pseudo-terminal may say that it has no size, and tqdm would then draw nothing.
    known = min(os.get_terminal_size(sys.stderr.fileno())) > 0
    return tqdm(
        total=steps,
        initial=first_step,
        unit="step",
        smoothing=0.1,
        ncols=None if known else 100,
        nrows=None if known else 24,
        dynamic_ncols=known,
        file=sys.stderr,
    )


def _open_log(path: Path, first_step: int) -> Any:
    # Steps past the commit that this run goes on from are made again, so their lines go.
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [report for report in read_log(path) if report.step <= first_step] if path.exists() else []
    file = path.open("w")
    file.writelines(json.dumps(asdict(report)) + "\n" for report in kept)
    file.flush()
    return file
