"""The processes of a side, from outside: starts them, has them make steps, and looks at what they cost."""

import json
import os
import select
import socket
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from benchmarks.processes import lent_bytes, peak_bytes, processor_seconds
from benchmarks.workload import Workload

_START_SECONDS = 300.0
_STEP_SECONDS = 120.0


class SideError(Exception):
    """A side's process ended or fell silent; the message has the end of what it wrote."""


@dataclass(frozen=True)
class Block:
    """Some steps in a row. seconds, losses: of each, the slowest trainer's and their mean.

    processor_seconds: of all processes, servers included, for the whole block. moved: bytes, all trainers together.
    spent: seconds of each trainer by where they went, as `Side.spent` names it, for the whole block.
    activation_bytes: the most that a forward has left for its backward since the start; 0 where the side does not look.
    """

    seconds: Sequence[float]
    losses: Sequence[float]
    processor_seconds: float
    moved: Mapping[str, int]
    spent: Sequence[Mapping[str, float]] = ()
    activation_bytes: int = 0


class Ranks:
    """The trainers of one side.

    python: the interpreter. module: with the side's `serve`. others: processes of the side that are not its trainers,
    as servers, by name; asked for whenever they are looked at.
    """

    def __init__(
        self,
        name: str,
        python: str,
        module: str,
        work: Workload,
        others: Callable[[], Mapping[str, int]] = dict,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self._others = others
        self._logs = tempfile.TemporaryDirectory(prefix="zero-ps-side-")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._before_model: list[int] = []
        self._moved: dict[str, int] = {}
        self._spent: list[dict[str, float]] = [{} for _ in range(work.world_size)]
        port = _free_port()
        for rank in range(work.world_size):
            with self._log(rank).open("wb") as log:
                self._processes.append(
                    subprocess.Popen(
                        [python, "-m", module, replace(work, rank=rank).encode()],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        env={
                            **os.environ,
                            **(environment or {}),
                            "RANK": str(rank),
                            "LOCAL_RANK": str(rank),
                            "WORLD_SIZE": str(work.world_size),
                            "LOCAL_WORLD_SIZE": str(work.world_size),
                            "MASTER_ADDR": "127.0.0.1",
                            "MASTER_PORT": str(port),
                            # DeepSpeed's NVMe hangs without it.
                            "OMP_NUM_THREADS": str(work.threads),
                            "PYTHONUNBUFFERED": "1",
                        },
                    )
                )

    def wait_ready(self) -> None:
        """Raises SideError."""
        self._before_model = [
            self._answer(rank, _START_SECONDS)["before_model"] for rank in range(len(self._processes))
        ]

    def block(self, steps: int) -> Block:
        """Has all trainers make steps. Raises SideError."""
        processor = self._processor_seconds()
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"steps": steps}).encode() + b"\n")
            process.stdin.flush()
        answers = [self._answer(rank, _STEP_SECONDS * steps) for rank in range(len(self._processes))]
        moved = {key: sum(answer["moved"][key] for answer in answers) for key in answers[0]["moved"]}
        block = Block(
            [max(each) for each in zip(*(answer["seconds"] for answer in answers), strict=True)],
            [sum(each) / len(each) for each in zip(*(answer["losses"] for answer in answers), strict=True)],
            self._processor_seconds() - processor,
            {key: value - self._moved.get(key, 0) for key, value in moved.items()},
            [
                {key: seconds - before.get(key, 0.0) for key, seconds in answer["spent"].items()}
                for answer, before in zip(answers, self._spent, strict=True)
            ],
            max(answer["activation_bytes"] for answer in answers),
        )
        self._moved, self._spent = moved, [answer["spent"] for answer in answers]
        return block

    def peak_bytes(self) -> dict[str, int]:
        """The most resident memory of each process since its start."""
        return {name: peak_bytes(pid) for name, pid in self.pids().items()}

    def beyond_start_bytes(self) -> int:
        """The most resident memory of a trainer beyond what it had before its model, without what servers lend."""
        return max(
            peak_bytes(process.pid) - lent_bytes(process.pid) - before
            for process, before in zip(self._processes, self._before_model, strict=True)
        )

    def pids(self) -> dict[str, int]:
        trainers = {f"trainer {rank}": process.pid for rank, process in enumerate(self._processes)}
        return {**trainers, **self._others()}

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        self._logs.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self, rank: int, timeout: float) -> dict[str, Any]:
        process = self._processes[rank]
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], timeout)
        line = process.stdout.readline() if readable else b""
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        what = f"did not answer within {timeout:.0f} s" if not readable else "ended"
        written = self._log(rank).read_text(errors="replace").strip().splitlines()
        raise SideError(f"{self.name}: trainer {rank} {what}; it wrote last: " + "\n".join(written[-5:]))

    def _processor_seconds(self) -> float:
        return sum(processor_seconds(pid) for pid in self.pids().values())

    def _log(self, rank: int) -> Path:
        return Path(self._logs.name) / f"trainer-{rank}.log"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
