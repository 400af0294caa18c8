"""Runs the steps that all trainers agreed on, chunk by chunk, in the background.

Of a step that was announced, chunks whose gradients are final are updated as they come, in batches that are worth
a call; the rest follows when the step is asked for. What trainers need first is updated first.

Where memory is limited, what the next batches need is read while one is stepped, and what the last ones
have changed is written: see `ps/tier`.
"""

import logging
import queue
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack

import torch

from ps.agreed_step import AgreedStep
from ps.averages import update_averages
from ps.chunk import Chunk
from ps.contributions import average, touched_rows
from ps.monitor import Monitor, Patience
from ps.optimizer import ChunkOptimizer
from ps.running_commits import RunningCommits
from ps.shard import FLUSH_SECONDS, Shard, at_liberty
from ps.tier import Part, ReadAhead
from ps.working_set import of_update, to_read_ahead

_FIRST_BATCH_BYTES, _BATCH_BYTES = 4 << 20, 16 << 20
"""Chunks up to this size together are stepped in one call of torch. A call costs some 250 µs, as much as AdamW on
0.8 MiB; but whoever waits for the first chunks waits for all of their batch."""

_EARLY_SHARE = 1 / 16
"""Of a shard: less than this is not worth an update while the others' gradients are still to come."""

_log = logging.getLogger(__name__)


class Updater:
    """The thread that updates one job's chunks.

    shard_lock: held while chunks change, so that who holds it (the beginning of a commit) sees a shard at rest.
    commits: no chunk leaves a step of which a commit has still to begin.
    late: updates are put off as long as `max_staleness` permits and nobody waits for them, to see what that does.
    """

    def __init__(
        self, job: str, shard_lock: threading.RLock, monitor: Monitor, commits: RunningCommits, *, late: bool = False
    ) -> None:
        self._job = job
        self._shard_lock = shard_lock
        self._monitor = monitor
        self._commits = commits
        self._late = late
        self._closing = False
        self._steps: queue.SimpleQueue[AgreedStep | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"updater-{job}", daemon=True)
        self._thread.start()

    def submit(self, step: AgreedStep) -> None:
        """There is something to do for the step: chunks are ready, or it is over."""
        self._steps.put(step)

    def need(self, shard: Shard, version: int) -> None:
        """Somebody waits for a version: it is put off no longer."""
        if self._late:
            with self._monitor:
                shard.needed_version = max(shard.needed_version, version)
                self._monitor.changed()

    def close(self) -> None:
        """Finishes the steps that were submitted."""
        self._closing = True
        self._monitor.changed()
        self._steps.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (step := self._steps.get()) is not None:
            try:
                over = step.ended or step.shard.failure is not None or self._advance(step)
            except Exception as error:
                _log.exception("job %r: step %d failed", self._job, step.step)
                step.shard.fail(f"step {step.step} failed on shard {step.shard.index}: {error}")
                over = True
            if over:
                step.end()
            # A local of an idle thread would keep a replaced shard in memory.
            del step
            self._monitor.changed()

    def _advance(self, step: AgreedStep) -> bool:
        """Updates what of a step can be updated by now. Whether there will be no more of it."""
        shard = step.shard
        if self._late:
            self._put_off(step)
        if step.lost is None:
            self._commits.wait_before_change(step.step, Patience.of(FLUSH_SECONDS))
        while True:
            with self._monitor:
                if step.lost is not None:
                    break
                # What comes after this instant is submitted anew.
                complete, chunks = step.complete, step.take(_early_bytes(shard), _BATCH_BYTES)
                if chunks:
                    step.moved = True
                    shard.newest_version = max(shard.newest_version, step.step + 1)
            if chunks:
                self._update(step, chunks, early=not complete)
            if complete:
                self._finish(step)
                return True
            if not chunks:
                return False
        if step.moved:
            _log.warning("job %r: step %d is half done: %s", self._job, step.step, step.lost)
            shard.fail(f"step {step.step} on shard {shard.index} is half done: {step.lost}")
        return True

    def _put_off(self, step: AgreedStep) -> None:
        """Waits until trainers are as far ahead as they may be, so that none can go on without this update."""
        shard, staleness = step.shard, step.contributions[0].terms.max_staleness
        self._monitor.wait_until(
            lambda: (
                shard.step > step.step + staleness
                or shard.needed_version > step.step
                or step.lost is not None
                or self._closing
                or not staleness
            ),
            Patience.of(FLUSH_SECONDS),
            lambda: f"trainers to be {staleness} steps ahead of step {step.step}",
        )

    def _finish(self, step: AgreedStep) -> None:
        shard = step.shard
        with self._shard_lock:
            # Also where no chunk is: what is committed has to be the same on every server.
            shard.generation = None
            assert shard.optimizer is not None
            shard.optimizer.set_options(step.options)
            shard.updated_step = step.step + 1
            shard.assigned = False

    def _update(self, step: AgreedStep, chunks: Sequence[Chunk], *, early: bool) -> None:
        shard, optimizer = step.shard, step.shard.optimizer
        assert optimizer is not None
        # For those that come early nobody waits yet.
        batches = list(_batches(shard, chunks, _BATCH_BYTES if early else _FIRST_BATCH_BYTES))
        ahead = ReadAhead(shard.tier, batches, lambda batch: to_read_ahead(batch, step.contributions, step.step))
        for number, batch in enumerate(batches):
            ahead.reached(number)
            with at_liberty(shard, batch, self._shard_lock):
                shard.generation = None
                optimizer.set_options(step.options)
                self._update_batch(step, optimizer, batch)
            for chunk in batch:
                shard.schedule.updated(chunk, early=early)
            self._monitor.changed()

    def _update_batch(self, step: AgreedStep, optimizer: ChunkOptimizer, batch: Sequence[Chunk]) -> None:
        by_rank = step.contributions
        with_gradient = [
            chunk
            for chunk in batch
            if chunk.parameter in optimizer.group_of and any(c.has(chunk, step.step) for c in by_rank)
        ]
        averaged = _averaged(step.shard, optimizer, batch)
        leased: Collection[Part] = ()
        averages: Mapping[Chunk, Part] = {}
        with ExitStack() as held:
            if step.shard.tier.limited and (with_gradient or averaged):
                needed = of_update(with_gradient, optimizer, by_rank, step.edits, step.step)
                needed.add_weight_averages(chunk for chunk in averaged if chunk not in with_gradient)
                leased, averages = set(needed.fresh), needed.averages
                what = f"the update of {batch[0].label}"
                held.enter_context(
                    step.shard.tier.lease(needed.read, needed.fresh, scratch_bytes=needed.scratch_bytes, what=what)
                )
                for chunk in batch:
                    held.enter_context(chunk.lock)
                for contributions, chunk, wide in needed.wide:
                    contributions.widen(chunk, step.step, wide)
            else:
                for chunk in batch:
                    held.enter_context(chunk.lock)
            stepped: list[tuple[Chunk, torch.Tensor]] = []
            rows: dict[Chunk, torch.Tensor] = {}
            for chunk in with_gradient:
                gradient = average(chunk, by_rank, step.step, averages.get(chunk))
                assert gradient is not None
                for edit in step.edits.get(chunk.parameter, ()):
                    edit.apply(gradient)
                stepped.append((chunk, gradient))
                if (touched := touched_rows(chunk, by_rank, step.step)) is not None:
                    rows[chunk] = touched
            for chunk, _ in stepped:
                chunk.weight.about_to_change()
            for has_state in (True, False):
                if part := [pair for pair in stepped if pair[0].has_state == has_state]:
                    optimizer.update(part, rows)
            if optimizer.ema_decay is not None:
                update_averages(averaged, optimizer.ema_decay)
            for chunk in batch:
                chunk.advance(changed=chunk in with_gradient, leased=leased)
                for contributions in by_rank:
                    contributions.updated(chunk)


def _averaged(shard: Shard, optimizer: ChunkOptimizer, chunks: Iterable[Chunk]) -> list[Chunk]:
    """Those of which an average is kept, with or without a gradient: all that is trained."""
    if optimizer.ema_decay is None:
        return []
    return [c for c in chunks if c.parameter in optimizer.group_of and shard.manifest[c.parameter].has_state]


def _early_bytes(shard: Shard) -> int:
    """Of the chunks that are ready before a step is complete, when they are updated. Where memory is limited at once,
    as gradients that wait would go to the disk and come back."""
    return 0 if shard.tier.limited else min(_BATCH_BYTES, int(shard.num_bytes * _EARLY_SHARE))


def _batches(shard: Shard, chunks: Iterable[Chunk], first_bytes: int) -> Iterator[list[Chunk]]:
    """Runs of chunks in the order given, the first one of about `first_bytes` and the next ones longer."""
    batch: list[Chunk] = []
    size = 0
    most = min(_BATCH_BYTES, shard.tier.lease_limit_bytes // 16) if shard.tier.limited else _BATCH_BYTES
    limit = min(most, first_bytes)
    for chunk in chunks:
        if batch and size + chunk.num_bytes() > limit:
            yield batch
            batch, size, limit = [], 0, min(most, 2 * limit)
        batch.append(chunk)
        size += chunk.num_bytes()
    if batch:
        yield batch
