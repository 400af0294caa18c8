"""How long a trainer's thread spends in the parts of a step, and how much of that it runs."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.processes import schedule

PHASES = ("forward", "backward", "update")


class Phases:
    """Adds up seconds of the calling thread by part of a step.

    seconds: by name: `forward`, `forward running` (on a processor), `forward ready` (others had the processors).
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began, before = time.perf_counter(), schedule()
        yield
        spent = schedule() - before
        self.seconds[phase] += time.perf_counter() - began
        self.seconds[f"{phase} running"] += spent.running
        self.seconds[f"{phase} ready"] += spent.ready
