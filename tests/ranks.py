"""Runs a function as several trainer processes."""

import importlib
import json
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests import forks

_ROOT = Path(__file__).parent.parent


def run_ranks(
    function: str, addresses: Sequence[str], world_size: int, *, timeout: float = 90, **arguments: Any
) -> list[Any]:
    """What `function` ("module:name" below tests) returned on each rank.

    It is called with the addresses and the arguments (JSON) in a process for each rank, with RANK
    and WORLD_SIZE set as torchrun does. What it returns may hold tensors. A rank that fails makes this
    raise AssertionError with its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            start_rank(function, addresses, rank, world_size, Path(folder) / f"{rank}.pt", **arguments)
            for rank in range(world_size)
        ]
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
        for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
            assert process.returncode == 0, f"rank {rank} of {function} failed:\n{output}"
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world_size)]


def start_rank(
    function: str, addresses: Sequence[str], rank: int, world_size: int, result: Path, **arguments: Any
) -> forks.Process:
    """One of the processes of `run_ranks`, started."""
    environment = {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(_ROOT),
    }
    call = json.dumps({"addresses": list(addresses), **arguments})
    return forks.Popen(
        [sys.executable, "-m", "tests.ranks", function, call, str(result)],
        env=environment,
        cwd=_ROOT,
        stdout=forks.PIPE,
        stderr=forks.STDOUT,
        text=True,
    )


def free_port() -> int:
    """A port of this host at which a process group may be formed."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _main() -> None:
    function, call, result = sys.argv[1:]
    module, name = function.split(":")
    torch.set_num_threads(1)
    value = getattr(importlib.import_module(f"tests.{module}"), name)(**json.loads(call))
    torch.save(value, result)


if __name__ == "__main__":
    _main()
