"""A side as a process: told over stdin how many steps to make, it says over its first stdout how long they took."""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch

from benchmarks.processes import peak_bytes
from benchmarks.workload import Batches, Workload


class Side(Protocol):
    """Trains the work's model.

    activation_bytes: the most that a forward has left for its backward, where the side has this attribute.
    """

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
    batches = Batches(work)
    _warm_up(work, batches)
    before = peak_bytes(os.getpid())
    side = make(work, batches)
    made = 0
    print(json.dumps({"ready": True, "before_model": before}), file=answers)
    for line in sys.stdin:
        seconds, losses = [], []
        for _ in range(json.loads(line)["steps"]):
            began = time.perf_counter()
            losses.append(side.step(made))
            seconds.append(time.perf_counter() - began)
            made += 1
        print(
            json.dumps(
                {
                    "seconds": seconds,
                    "losses": losses,
                    "moved": side.moved(),
                    "spent": side.spent(),
                    "activation_bytes": getattr(side, "activation_bytes", 0),
                }
            ),
            file=answers,
        )


def _warm_up(work: Workload, batches: Batches) -> None:
    """Has torch load and compile what it needs for any model of these sizes, which is no side's doing."""
    model = replace(work, layers=1).model().to(torch.bfloat16)
    torch.autograd.backward(model(*batches.at(0)))
