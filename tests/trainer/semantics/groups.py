"""Trainers of one group as threads of the test's process."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import trainer


def run_group(addresses: Sequence[str], job: str, world_size: int, rank_of: Callable[[trainer.Job], Any]) -> list[Any]:
    """What each rank's call returned, with its connection; the first error of any."""

    def run(rank: int) -> Any:
        with trainer.connect(addresses, job=job, rank=rank, world_size=world_size, timeout=30) as connection:
            return rank_of(connection)

    with ThreadPoolExecutor(world_size) as pool:
        return [call.result() for call in [pool.submit(run, rank) for rank in range(world_size)]]
