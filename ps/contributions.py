"""Gradient contributions of one session: each counts once, micro-batches add up in order of arrival.

Every trainer has its own accumulators, and the average over trainers is taken in rank order at the step.
So the result does not depend on whose gradient arrived first.
"""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ps.chunk import Chunk
from ps.errors import Conflict


@dataclass(eq=False)
class _Accumulator:
    """The sum and its count are guarded by the chunk's lock, which an update of the chunk holds, too.

    tensor: the sum, of the chunk's shape; its memory outlives `filled` to be used again.
    count: contributions counted in `step`.
    zero_after_update: `zero_grad` came while the update that reads this was still to run.
    """

    tensor: torch.Tensor | None = None
    filled: bool = False
    step: int = -1
    count: int = 0
    zero_after_update: bool = False

    def zero(self) -> None:
        self.filled = False
        self.zero_after_update = False
        self.count = 0


class Contributions:
    """What one session has contributed.

    lock: held while a push is applied and while the session says that its contributions are final, so
        that a push is in a step whole or not at all.
    final_step: the step for which the contributions are final, or -1.
    epoch: how often this session discarded contributions to the job's present step that were final. Ranks
        do so together, but not at the same moment: only those of one epoch belong together.
    stepped: the last step that this session asked for, or -1.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.final_step = -1
        self.epoch = 0
        self.stepped = -1
        self._accumulators: dict[Chunk, _Accumulator] = {}
        # Between `zero` and the updater, so that `zero` need not wait for the updates that are running.
        self._zero_lock = threading.Lock()

    @property
    def resident_bytes(self) -> int:
        accumulators = list(self._accumulators.values())
        return sum(a.tensor.nbytes for a in accumulators if a.tensor is not None)

    def check_sequence(self, chunk: Chunk, step: int, sequence: int) -> bool:
        """Whether this contribution is still to be counted. Raises Conflict if one before it is missing."""
        accumulator = self._accumulators.get(chunk)
        counted = accumulator.count if accumulator is not None and accumulator.step == step else 0
        if sequence > counted:
            raise Conflict(f"gradient {sequence} of {chunk.label} in step {step} came before gradient {counted} did")
        return sequence == counted

    def add(self, chunk: Chunk, gradient: torch.Tensor, step: int) -> torch.Tensor | None:
        """Adds a contribution (flat, any floating dtype). Returns memory that the caller may use again.

        The first contribution in the accumulation dtype is taken over without a copy.
        """
        spare: torch.Tensor | None = gradient
        with chunk.lock:
            accumulator = self._accumulators.setdefault(chunk, _Accumulator())
            if accumulator.step != step:
                accumulator.step, accumulator.count = step, 0
            gradient = gradient.view(chunk.shape)
            if accumulator.filled:
                assert accumulator.tensor is not None
                accumulator.tensor.add_(gradient)
            elif gradient.dtype == chunk.accumulation_dtype:
                spare, accumulator.tensor = accumulator.tensor, gradient
            else:
                if accumulator.tensor is None:
                    accumulator.tensor = torch.empty(chunk.shape, dtype=chunk.accumulation_dtype)
                accumulator.tensor.copy_(gradient)
            accumulator.filled = True
            accumulator.count += 1
        return spare

    def zero(self, chunks: Iterable[Chunk], next_step: int) -> None:
        """Discards what was contributed to these chunks.

        next_step: where this session is. A chunk that is not there yet still has an update to come that
        needs the gradient, which is discarded right after. Expects `lock` to be held.
        """
        for chunk in chunks:
            accumulator = self._accumulators.get(chunk)
            if accumulator is None:
                continue
            with self._zero_lock:
                if chunk.version < next_step:
                    accumulator.zero_after_update = True
                else:
                    accumulator.zero()

    def gradient(self, chunk: Chunk) -> torch.Tensor | None:
        """The sum so far, or None; expects the chunk's lock to be held."""
        accumulator = self._accumulators.get(chunk)
        return accumulator.tensor if accumulator is not None and accumulator.filled else None

    def updated(self, chunk: Chunk) -> None:
        """The chunk is at its next version and its gradient was used; expects its lock to be held."""
        accumulator = self._accumulators.get(chunk)
        if accumulator is not None:
            with self._zero_lock:
                if accumulator.zero_after_update:
                    accumulator.zero()


def average(chunk: Chunk, by_rank: Sequence[Contributions]) -> torch.Tensor | None:
    """The mean of the trainers' gradients, in the weight's dtype; None if nobody contributed.

    A trainer that contributed nothing counts as zero. With one trainer the result is its accumulator
    itself. Expects the chunk's lock to be held.
    """
    gradients = [g for c in by_rank if (g := c.gradient(chunk)) is not None]
    if not gradients:
        return None
    if len(by_rank) == 1:
        total = gradients[0]
    else:
        total = gradients[0].clone() if len(gradients) == 1 else gradients[0] + gradients[1]
        for gradient in gradients[2:]:
            total += gradient
        total /= len(by_rank)
    return total if total.dtype == chunk.dtype else total.to(chunk.dtype)
