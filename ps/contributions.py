"""Gradient contributions of one session: each counts once, micro-batches add up in order of arrival.

Every trainer has its own accumulators, and the average over trainers is taken in rank order at the step.
So the result does not depend on whose gradient arrived first.
"""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch

from ps.chunk import Chunk
from ps.errors import Conflict
from ps.monitor import Patience
from ps.runs import Runs
from ps.tier import Incoming, Part


@dataclass(frozen=True)
class Gradient:
    """A contribution to one chunk.

    runs: the elements that `values` are of; None for all. The others contribute zero.
    values: flat, of any floating dtype.
    """

    chunk: Chunk
    runs: Runs | None
    values: Incoming


@dataclass(frozen=True)
class Terms:
    """What all trainers have to say alike when they state the optimizer.

    reduction: how their gradients become one. ema_decay: of the average of weights, or None for none.
    max_staleness: how many steps a chunk may be behind the gradients that come for it.
    kept_rows: parameters of which rows that no gradient names keep their weight and state.
    """

    reduction: Literal["mean", "sum"] = "mean"
    ema_decay: float | None = None
    max_staleness: int = 0
    kept_rows: frozenset[int] = frozenset()

    def difference(self, other: "Terms") -> tuple[str, object, object]:
        """The first term that is another: what trainers call it, and both values."""
        names = {"reduction": "gradient_reduction", "kept_rows": "the parameters with untouched_rows='keep'"}
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine != theirs:
                return names.get(field.name, field.name), mine, theirs
        raise ValueError("these terms are the same")


@dataclass(eq=False)
class _Accumulator:
    """The sum and its count are guarded by the chunk's lock, which an update of the chunk holds, too.

    part: the sum, of the chunk's shape. In a limited tier a single contribution stays in the dtype in which
        it came: converting it later is exact, and it takes half the room on disk.
    count: contributions counted in `step`.
    final_step: the step in which the trainer contributes no more to this chunk, or -1.
    zeros: there is a gradient, and it is 0 everywhere; `part` has nothing.
    zero_after_update: `zero_grad` came while the update that reads this was still to run.
    keep_zeros: what it asked for then; see `zeros`.
    begun: the step of the first gradient that is in it. Updates of earlier steps do not use it.
    whole: there is a gradient of the whole chunk. rows: a bool for each row that there is one of otherwise; None for
        no row at all.
    until: if it is set aside, the last step whose update uses it.
    slot: tells it from others of the chunk.
    """

    part: Part | None = None
    step: int = -1
    count: int = 0
    final_step: int = -1
    zeros: bool = False
    zero_after_update: bool = False
    keep_zeros: bool = False
    begun: int = 0
    whole: bool = False
    rows: torch.Tensor | None = None
    until: int = -1
    slot: int = 0

    @property
    def occupied(self) -> bool:
        """Whether there is a gradient, be it 0."""
        return self.zeros or (self.part is not None and self.part.filled)


class Contributions:
    """What one session has contributed.

    name: tells its accumulators from those of other sessions.
    lock: held while a push is applied and while the session says that its contributions are final, so
        that a push is in a step whole or not at all.
    final_step: the step for which the contributions are final, or -1.
    epoch: how often this session discarded contributions to the job's present step that were final. Ranks
        do so together, but not at the same moment: only those of one epoch belong together.
    stepped: the last step that this session asked for, or -1.
    done: chunks that the session announced to contribute no more to in the next step.
    zeroes: the announced step that uses gradients up, as if `zero` came right after it, or -1.
    terms: those of the optimizer, `stated` once this session has.
    """

    def __init__(self, name: str = "gradient") -> None:
        self.terms = Terms()
        self.stated = False
        self.name = name
        self.lock = threading.RLock()
        self.final_step = -1
        self.epoch = 0
        self.stepped = -1
        self.done: frozenset[Chunk] = frozenset()
        self.zeroes = -1
        self._accumulators: dict[Chunk, _Accumulator] = {}
        # With `max_staleness`: those that updates to come still use while gradients of later steps go to another
        # one, oldest first; and those that are free.
        self._aside: dict[Chunk, tuple[_Accumulator, ...]] = {}
        self._spare: dict[Chunk, list[_Accumulator]] = {}
        # Between `zero` and the updater, so that `zero` need not wait for the updates that are running.
        self._zero_lock = threading.Lock()
        self._holders = 1

    @property
    def resident_bytes(self) -> int:
        found = [accumulator for chunk in list(self._accumulators) for accumulator in self._all(chunk)]
        return sum(a.part.resident_bytes for a in found if a.part is not None)

    def _all(self, chunk: Chunk) -> list[_Accumulator]:
        return [*self._aside.get(chunk, ()), self._accumulators[chunk], *self._spare.get(chunk, ())]

    def hold(self) -> None:
        """A step that was agreed on will use this even if the session ends."""
        with self._zero_lock:
            self._holders += 1

    def drop(self) -> None:
        """The session, or a step that held this, needs it no more. The last one discards it."""
        with self._zero_lock:
            self._holders -= 1
            if self._holders:
                return
        for chunk in list(self._accumulators):
            for accumulator in self._all(chunk):
                if accumulator.part is not None:
                    chunk.tier.discard([accumulator.part])

    def check_sequence(self, chunk: Chunk, step: int, sequence: int) -> bool:
        """Whether this contribution is still to be counted. Raises Conflict if one before it is missing."""
        accumulator = self._accumulators.get(chunk)
        counted = accumulator.count if accumulator is not None and accumulator.step == step else 0
        if sequence > counted:
            raise Conflict(f"gradient {sequence} of {chunk.label} in step {step} came before gradient {counted} did")
        return sequence == counted

    def finish(self, chunk: Chunk, step: int) -> None:
        """The chunk gets no more gradients in this step; expects `lock` and the job's monitor to be held."""
        self._accumulators.setdefault(chunk, _Accumulator()).final_step = step

    def is_final(self, chunk: Chunk, step: int) -> bool:
        """Whether the step may use the chunk's gradient as it is."""
        if self.stepped == step:
            return True
        accumulator = self._accumulators.get(chunk)
        return accumulator is not None and accumulator.final_step == step

    def reopen(self, step: int) -> None:
        """The session may contribute again to what it announced to be done with; expects what `finish` does."""
        for chunk in self.done:
            accumulator = self._accumulators.get(chunk)
            if accumulator is not None and accumulator.final_step == step:
                accumulator.final_step = -1
        self.done = frozenset()

    def final_chunks(self, step: int) -> list[Chunk]:
        """The chunks that `finish` was called for."""
        return [chunk for chunk, accumulator in list(self._accumulators.items()) if accumulator.final_step == step]

    def add(self, gradient: Gradient, step: int, patience: Patience | None = None) -> torch.Tensor | None:
        """Adds a contribution. Returns memory that the caller may use again.

        Where it can, it takes over the memory of the first one. Expects `lock` to be held.
        """
        chunk, values = gradient.chunk, gradient.values
        accumulator = self._accumulators.setdefault(chunk, _Accumulator())
        while True:
            with chunk.lock:
                part = accumulator.part
                if part is None or not part.filled:
                    accumulator.begun = step
                    if gradient.runs is None:
                        spare = self._begin(chunk, accumulator, values)
                        self._count(gradient, accumulator, step)
                        return spare
                    part = None
            if part is None:
                if self._begin_with_runs(gradient, accumulator, step, patience):
                    return values.tensor
                continue
            wide = self.new_wide(chunk, step) or part
            fresh = [wide] if wide is not part else []
            with chunk.tier.lease([part], fresh, what=part.label, patience=patience), chunk.lock:
                # An update that is just done may have emptied it.
                if accumulator.part is not part or not part.filled:
                    continue
                if wide is not part:
                    self.widen(chunk, step, wide)
                if gradient.runs is None:
                    wide.tensor.add_(values.tensor.view(chunk.shape))
                else:
                    gradient.runs.add_into(wide.tensor, values.tensor)
                wide.changed()
                self._count(gradient, accumulator, step)
            chunk.tier.give_back(values)
            return values.tensor

    def _begin_with_runs(
        self, gradient: Gradient, accumulator: _Accumulator, step: int, patience: Patience | None
    ) -> bool:
        """Makes a contribution to parts of a chunk the first one. False if another one came before it."""
        chunk, old = gradient.chunk, accumulator.part
        assert gradient.runs is not None
        part = old
        if part is None or part.dtype != chunk.accumulation_dtype:
            part = self._new_part(chunk, chunk.accumulation_dtype, accumulator)
        with chunk.tier.lease((), [part], what=part.label, patience=patience), chunk.lock:
            if accumulator.part is not old or (old is not None and old.filled):
                return False
            gradient.runs.copy_into(part.tensor.zero_(), gradient.values.tensor)
            part.changed()
            if old is not None and old is not part:
                chunk.tier.discard([old])
            accumulator.part = part
            self._count(gradient, accumulator, step)
        chunk.tier.give_back(gradient.values)
        return True

    def _begin(self, chunk: Chunk, accumulator: _Accumulator, gradient: Incoming) -> torch.Tensor | None:
        """Makes a contribution the first one."""
        tier = chunk.tier
        dtype = gradient.tensor.dtype if tier.limited else chunk.accumulation_dtype
        part = accumulator.part
        if part is None or part.dtype != dtype:
            if part is not None:
                tier.discard([part])
            part = accumulator.part = self._new_part(chunk, dtype, accumulator)
        if gradient.tensor.dtype == dtype:
            return tier.adopt(part, gradient)
        part.tensor.copy_(gradient.tensor.view(chunk.shape))
        part.changed()
        return gradient.tensor

    def _new_part(self, chunk: Chunk, dtype: torch.dtype, accumulator: _Accumulator) -> Part:
        slot = f"-{accumulator.slot}" if accumulator.slot else ""
        return chunk.new_part(f"{self.name}{slot}-{str(dtype).removeprefix('torch.')}", dtype, kind="gradient")

    @staticmethod
    def _count(gradient: Gradient, accumulator: _Accumulator, step: int) -> None:
        if gradient.runs is None:
            accumulator.whole = True
        elif not accumulator.whole:
            rows = gradient.runs.rows(gradient.chunk)
            accumulator.rows = rows if accumulator.rows is None else accumulator.rows | rows
        if accumulator.step != step:
            accumulator.step, accumulator.count = step, 0
        accumulator.count += 1
        accumulator.zeros = False

    def zero(self, chunks: Iterable[Chunk], next_step: int, keep_zeros: bool = False) -> None:
        """Discards what was contributed to these chunks.

        keep_zeros: where there was a gradient it is 0 from then on.
        next_step: where this session is. A chunk that is not there yet still has an update to come that
        needs the gradient, which is discarded right after. Expects `lock` to be held.
        """
        for chunk in chunks:
            accumulator = self._accumulators.get(chunk)
            if accumulator is None:
                continue
            with self._zero_lock:
                # Of two in a row the first decides whether there is a gradient still.
                accumulator.keep_zeros = keep_zeros and (accumulator.keep_zeros or not accumulator.zero_after_update)
                if chunk.version >= next_step:
                    self._zero(chunk, accumulator)
                elif not self.terms.max_staleness:
                    accumulator.zero_after_update = True
                elif accumulator.occupied and accumulator.begun < next_step:
                    self._set_aside(chunk, accumulator, next_step)
                else:
                    self._zero(chunk, accumulator)

    def _set_aside(self, chunk: Chunk, accumulator: _Accumulator, next_step: int) -> None:
        """Keeps a sum for the updates before `next_step` and begins another one; expects `_zero_lock`."""
        accumulator.until = next_step - 1
        # First, so that `_of` finds it in the one place or the other.
        aside = self._aside[chunk] = (*self._aside.get(chunk, ()), accumulator)
        spare = self._spare.get(chunk)
        new = spare.pop() if spare else _Accumulator(slot=len(aside))
        new.begun, new.zeros, new.keep_zeros = next_step, accumulator.keep_zeros, accumulator.keep_zeros
        self._accumulators[chunk] = new

    def oldest_version(self, chunk: Chunk, step: int) -> int:
        """Which version a chunk has to have reached for a gradient of this step to be added."""
        accumulator = self._accumulators.get(chunk)
        if accumulator is not None and accumulator.occupied and accumulator.begun < step:
            # `zero_grad` was forgotten: it adds to what updates before this step still use.
            return step
        return max(0, step - self.terms.max_staleness)

    def _of(self, chunk: Chunk, step: int) -> _Accumulator | None:
        """What the update of a step uses. From any thread."""
        present = self._accumulators.get(chunk)
        for accumulator in self._aside.get(chunk, ()):
            if accumulator.begun <= step <= accumulator.until:
                return accumulator
        return present if present is not None and present.begun <= step else None

    def has(self, chunk: Chunk, step: int) -> bool:
        """Whether there is a gradient of the chunk for a step, be it 0."""
        accumulator = self._of(chunk, step)
        return accumulator is not None and accumulator.occupied

    def part(self, chunk: Chunk, step: int) -> Part | None:
        """The sum so far for a step, or None. It may be narrower than what sums are kept in."""
        accumulator = self._of(chunk, step)
        part = None if accumulator is None else accumulator.part
        return part if part is not None and part.filled else None

    def touches(self, chunk: Chunk, step: int) -> torch.Tensor | None:
        """A bool for each row of a chunk: whether there is a gradient of it for a step; None for all of them."""
        accumulator = self._of(chunk, step)
        if accumulator is None or (not accumulator.whole and accumulator.rows is None):
            return torch.zeros(chunk.shape[0], dtype=torch.bool)
        return None if accumulator.whole else accumulator.rows

    def new_wide(self, chunk: Chunk, step: int) -> Part | None:
        """A part to pass to `widen`, if the sum is narrower than what sums are kept in."""
        accumulator = self._of(chunk, step)
        if accumulator is None or accumulator.part is None or not accumulator.part.filled:
            return None
        if accumulator.part.dtype == chunk.accumulation_dtype:
            return None
        return self._new_part(chunk, chunk.accumulation_dtype, accumulator)

    def widen(self, chunk: Chunk, step: int, wide: Part) -> None:
        """Has the sum in another part from now on; expects a lease of both, and the chunk's lock."""
        accumulator = self._of(chunk, step)
        assert accumulator is not None and accumulator.part is not None
        wide.tensor.copy_(accumulator.part.tensor)
        wide.changed()
        chunk.tier.discard([accumulator.part])
        accumulator.part = wide

    def updated(self, chunk: Chunk) -> None:
        """The chunk is at its next version and its gradient was used; expects its lock to be held."""
        accumulator = self._accumulators.get(chunk)
        if accumulator is not None:
            with self._zero_lock:
                if accumulator.zero_after_update:
                    self._zero(chunk, accumulator)
                elif self.zeroes == chunk.version - 1 != self.stepped:
                    # With its step `zero` sees to the rest.
                    accumulator.keep_zeros = False
                    self._drop(chunk, accumulator)
                if aside := self._aside.get(chunk):
                    self._free(chunk, [each for each in aside if each.until < chunk.version])

    def _free(self, chunk: Chunk, accumulators: Sequence[_Accumulator]) -> None:
        """No update uses these any more; expects `_zero_lock`."""
        for accumulator in accumulators:
            accumulator.keep_zeros = False
            self._zero(chunk, accumulator)
            self._spare.setdefault(chunk, []).append(accumulator)
        self._aside[chunk] = tuple(each for each in self._aside[chunk] if each not in accumulators)

    @staticmethod
    def _drop(chunk: Chunk, accumulator: _Accumulator) -> None:
        """The gradient goes; that it was counted is still known."""
        accumulator.zeros = accumulator.occupied and accumulator.keep_zeros
        if accumulator.part is not None:
            chunk.tier.empty(accumulator.part)
        accumulator.whole, accumulator.rows = False, None

    @classmethod
    def _zero(cls, chunk: Chunk, accumulator: _Accumulator) -> None:
        cls._drop(chunk, accumulator)
        accumulator.zero_after_update = False
        accumulator.count = 0


def average(chunk: Chunk, by_rank: Sequence[Contributions], step: int, into: Part | None = None) -> torch.Tensor | None:
    """The mean or sum of the trainers' gradients for a step, in the weight's dtype; None if nobody contributed.

    into: what `new_average` made; None for memory of torch's own.
    A trainer that contributed nothing counts as zero. With one trainer the result is its accumulator
    itself if that has the weight's dtype. Expects a lease of the parts and of `into`, and the chunk's lock.
    """
    gradients = gradient_parts(chunk, by_rank, step)
    if (dtype := _average_dtype(chunk, gradients, by_rank, step)) is None:
        return gradients[0].tensor if gradients else None
    total = torch.empty(chunk.shape, dtype=dtype) if into is None else into.tensor
    if not gradients:
        return total.zero_()
    total.copy_(gradients[0].tensor)
    for gradient in gradients[1:]:
        total += gradient.tensor
    if len(by_rank) > 1 and by_rank[0].terms.reduction == "mean":
        total /= len(by_rank)
    return total if dtype == chunk.dtype else total.to(chunk.dtype)


def new_average(chunk: Chunk, by_rank: Sequence[Contributions], step: int) -> Part | None:
    """A part to pass to `average`, which gives it its content; None where that needs none.

    Memory of the tier, which is used again and again: torch's own would come in fresh pages for each chunk.
    """
    dtype = _average_dtype(chunk, gradient_parts(chunk, by_rank, step), by_rank, step)
    return None if dtype is None else chunk.new_part("gradient-average", dtype)


def _average_dtype(
    chunk: Chunk, parts: Sequence[Part], by_rank: Sequence[Contributions], step: int
) -> torch.dtype | None:
    """In which an average of these parts is computed; None if there is none, or it is an accumulator."""
    if not parts:
        return chunk.dtype if any(c.has(chunk, step) for c in by_rank) else None
    if len(by_rank) == 1:
        return None if parts[0].dtype == chunk.dtype else chunk.dtype
    return chunk.accumulation_dtype


def gradient_parts(chunk: Chunk, by_rank: Sequence[Contributions], step: int) -> list[Part]:
    """The trainers' accumulators for a step that have something in them, in rank order."""
    return [part for c in by_rank if (part := c.part(chunk, step)) is not None]


def touched_rows(chunk: Chunk, by_rank: Sequence[Contributions], step: int) -> torch.Tensor | None:
    """The rows that a step updates, by their numbers: those that any trainer has a gradient of; None for all."""
    if chunk.parameter not in by_rank[0].terms.kept_rows or chunk.elements == 0:
        return None
    touched = [contributions.touches(chunk, step) for contributions in by_rank]
    masks = [rows for rows in touched if rows is not None]
    return torch.stack(masks).any(dim=0).nonzero().view(-1) if len(masks) == len(touched) else None
