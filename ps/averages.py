"""The moving average of weights that servers keep beside them, as an array of each chunk's state.

The same arithmetic as `torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn(decay)`, updated after
every step: the first time it becomes the weight, from then on `average.lerp_(weight, 1 - decay)`.
"""

from collections.abc import Iterable

from protos.names import EMA
from ps.chunk import Chunk
from ps.store import StateArray
from ps.tier import Part

ARRAY = StateArray(EMA, None, True)
"""How it is stored."""


def average_part(chunk: Chunk) -> Part:
    """Where a chunk's average is, or will be."""
    return chunk.state_part(EMA, chunk.dtype, scalar=False)


def update_averages(chunks: Iterable[Chunk], decay: float) -> None:
    """After a step; expects leases of weights and averages, and the chunks' locks."""
    for chunk in chunks:
        part, weight = average_part(chunk), chunk.weight.tensor
        if part.filled:
            part.tensor.lerp_(weight, 1 - decay)
        else:
            part.tensor.copy_(weight)
        part.changed()
        chunk.stored = None


def drop_averages(chunks: Iterable[Chunk]) -> bool:
    """They are not kept any more. Whether there were any."""
    dropped = False
    for chunk in chunks:
        with chunk.lock:
            if (part := chunk.state.pop(EMA, None)) is None:
                continue
            chunk.tier.discard([part])
            chunk.stored = None
            dropped = True
    return dropped
