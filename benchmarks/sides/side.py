"""A side as a process: told over stdin how many steps to make, it says over its first stdout how long they took."""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Protocol

import torch

from benchmarks.workload import Batches, Workload


class Side(Protocol):
    """Trains the work's model."""

    def step(self, index: int) -> float:
        """One step on the batch of this index, whole; the loss of this process."""

    def moved(self) -> dict[str, int]:
        """Bytes of tensors that this process has moved since the start, by direction; empty where nobody counts."""

    def spent(self) -> dict[str, float]:
        """Seconds since the start, as `Phases` names them, and what else the side knows of where they went."""


def serve(make: Callable[[Workload, Batches], Side]) -> None:
    """What a side's process runs. Whatever the side prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    work = Workload.decode(sys.argv[1])
    torch.set_num_threads(work.threads)
    side = make(work, Batches(work))
    made = 0
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        seconds, losses = [], []
        for _ in range(json.loads(line)["steps"]):
            began = time.perf_counter()
            losses.append(side.step(made))
            seconds.append(time.perf_counter() - began)
            made += 1
        print(
            json.dumps({"seconds": seconds, "losses": losses, "moved": side.moved(), "spent": side.spent()}),
            file=answers,
        )
