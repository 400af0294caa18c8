"""Runs the steps that all trainers agreed on, chunk by chunk, in the background."""

import logging
import queue
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from ps.chunk import Chunk
from ps.contributions import Contributions, average
from ps.monitor import Monitor
from ps.optimizer import Options
from ps.shard import Shard

_BATCH_BYTES = 4 << 20
"""Chunks up to this size together are stepped in one call of torch, whose cost per call is some 50 µs."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AgreedStep:
    """A step that every trainer has said is final.

    scales: factors for the averaged gradients, by parameter.
    contributions: by rank.
    """

    shard: Shard
    step: int
    options: Options
    scales: Mapping[int, tuple[float, ...]]
    contributions: tuple[Contributions, ...]


class Updater:
    """The thread that updates one job's chunks.

    shard_lock: held while chunks change, so that who holds it (a commit) sees a shard at rest.
    """

    def __init__(self, job: str, shard_lock: threading.RLock, monitor: Monitor) -> None:
        self._job = job
        self._shard_lock = shard_lock
        self._monitor = monitor
        self._steps: queue.SimpleQueue[AgreedStep | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"updater-{job}", daemon=True)
        self._thread.start()

    def submit(self, step: AgreedStep) -> None:
        self._steps.put(step)

    def close(self) -> None:
        """Finishes the steps that were submitted."""
        self._steps.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (step := self._steps.get()) is not None:
            if step.shard.failure is not None:
                continue
            try:
                self._update(step)
            except Exception as error:
                _log.exception("job %r: step %d failed", self._job, step.step)
                step.shard.fail(f"step {step.step} failed on shard {step.shard.index}: {error}")
            # A local of an idle thread would keep a replaced shard in memory.
            del step
            self._monitor.changed()

    def _update(self, step: AgreedStep) -> None:
        optimizer = step.shard.optimizer
        assert optimizer is not None
        for batch in _batches(step.shard):
            with self._shard_lock, ExitStack() as locks:
                step.shard.generation = None
                optimizer.set_options(step.options)
                for chunk in batch:
                    locks.enter_context(chunk.lock)
                stepped: list[tuple[Chunk, torch.Tensor]] = []
                for chunk in batch:
                    gradient = None
                    if chunk.parameter in optimizer.group_of:
                        gradient = average(chunk, step.contributions)
                    if gradient is not None:
                        for scale in step.scales.get(chunk.parameter, ()):
                            gradient.mul_(scale)
                        stepped.append((chunk, gradient))
                for has_state in (True, False):
                    if part := [pair for pair in stepped if bool(pair[0].state) == has_state]:
                        optimizer.update(part)
                changed = {chunk for chunk, _ in stepped}
                for chunk in batch:
                    chunk.advance(changed=chunk in changed)
                    for contributions in step.contributions:
                        contributions.updated(chunk)
            self._monitor.changed()
        with self._shard_lock:
            # Also where no chunk is: what is committed has to be the same on every server.
            step.shard.generation = None
            optimizer.set_options(step.options)
            step.shard.updated_step = step.step + 1


def _batches(shard: Shard) -> Iterator[list[Chunk]]:
    """Runs of chunks in the order of the manifest, which is about the order in which a forward needs them."""
    batch: list[Chunk] = []
    size = 0
    for chunk in shard:
        if batch and size + chunk.num_bytes() > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(chunk)
        size += chunk.num_bytes()
    if batch:
        yield batch
