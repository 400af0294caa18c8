"""Trainers as processes that a test starts, stops and kills."""

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import torch

from ps import LocalCluster
from tests.trainer.recovery.programs import Notes, Plain, run

SECONDS = 240.0


class Trainers:
    """Processes that run `programs.steps`, by name; a name is a rank and perhaps more.

    They are forks of one that has imported everything, which takes longest.
    """

    def __init__(self, cluster: LocalCluster, job: str, folder: Path) -> None:
        self._cluster, self._job, self._folder = cluster, job, folder
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.trainer.recovery.programs"])
        self._processes: dict[str, Any] = {}

    def start(self, name: str, world_size: int = 2, **arguments: Any) -> None:
        arguments = {"addresses": self._cluster.addresses, "job": self._job, "notes": str(self._folder)} | arguments
        process = self._context.Process(
            target=run, args=(int(name[0]), world_size, str(self._folder / name), {"until": 6} | arguments)
        )
        process.start()
        self._processes[name] = process

    def notes(self, name: str) -> Notes:
        return Notes(self._folder, name)

    def signal(self, name: str, number: signal.Signals) -> None:
        os.kill(self._processes[name].pid, number)

    def kill(self, name: str) -> None:
        process = self._processes.pop(name)
        process.kill()
        process.join()

    def failed(self, name: str) -> str:
        """The error with which a trainer ends."""
        process = self._processes.pop(name)
        process.join(SECONDS)
        assert process.exitcode == 1, process.exitcode
        return (self._folder / f"{name}.error").read_text()

    def results(self) -> dict[str, dict[str, Any]]:
        for name, process in self._processes.items():
            process.join(SECONDS)
            error = self._folder / f"{name}.error"
            said = error.read_text() if error.exists() else "nothing"
            assert process.exitcode == 0, f"trainer {name} ended with {process.exitcode} and said:\n{said}"
        return {name: torch.load(self._folder / name) for name in self._processes}

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.join()


def check(results: dict[str, dict[str, Any]], steps: int) -> Plain:
    """Compares losses and parameters with plain torch, which has as many trainers at each step, and two where nobody
    is left who made it."""
    sizes = {step: place[1] for result in results.values() for step, place in result["places"].items()}
    plain = Plain(lambda step: sizes.get(step, 2)).train_to(steps)
    for result in results.values():
        for step, loss in result["losses"].items():
            assert loss == plain.losses[step][result["places"][step][0]], step
        plain.check(result["params"])
    return plain
