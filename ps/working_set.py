"""What of memory an update of chunks takes, all at once."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ps.averages import average_part
from ps.chunk import Chunk
from ps.contributions import Contributions, gradient_parts, new_average, touched_rows
from ps.operands import SomeRows
from ps.optimizer import ChunkOptimizer
from ps.shard import Shard
from ps.store import StateArray
from ps.tier import SMALL_BYTES, Part

_SCRATCH_TENSORS = 3
"""What an optimizer that is not fused allocates at most, in tensors of a chunk's size."""


_ROW_COPIES = 2
"""What an update of some rows copies besides their state: weight and gradient."""


@dataclass
class WorkingSet:
    """The parts of an update: those that it reads, those that it fills, and bytes that it allocates besides.

    wide: accumulators that it edits and that are too narrow for that, by session and chunk.
    averages: where those of gradients go.
    """

    read: list[Part] = field(default_factory=list)
    fresh: list[Part] = field(default_factory=list)
    scratch_bytes: int = 0
    wide: list[tuple[Contributions, Chunk, Part]] = field(default_factory=list)
    averages: dict[Chunk, Part] = field(default_factory=dict)

    def add_weight_averages(self, chunks: Iterable[Chunk]) -> None:
        """What the averages of weights take of chunks that are not updated."""
        for chunk in chunks:
            self.read.append(chunk.weight)
            part = average_part(chunk)
            (self.read if part.filled else self.fresh).append(part)


def of_update(
    chunks: Iterable[Chunk],
    optimizer: ChunkOptimizer,
    by_rank: Sequence[Contributions],
    edited: Iterable[int],
    step: int,
) -> WorkingSet:
    """Of chunks that have gradients for a step. edited: parameters whose gradients are edited."""
    found = WorkingSet()
    for chunk in chunks:
        found.read.append(chunk.weight)
        found.read += (part for part in chunk.state.values() if part.filled)
        new = optimizer.new_state(chunk)
        found.fresh += new
        # What torch allocates itself, before it is moved to where it belongs.
        found.scratch_bytes += sum(part.size for part in new if part.spillable)
        found.fresh += chunk.copies.values()
        found.read += gradient_parts(chunk, by_rank, step)
        if len(by_rank) == 1 and chunk.parameter in edited and (wide := by_rank[0].new_wide(chunk, step)) is not None:
            found.fresh.append(wide)
            found.wide.append((by_rank[0], chunk, wide))
        if (into := new_average(chunk, by_rank, step)) is not None:
            found.fresh.append(into)
            found.averages[chunk] = into
        if (rows := touched_rows(chunk, by_rank, step)) is not None:
            copies = _ROW_COPIES + sum(array.per_element for array in optimizer.arrays.values())
            found.scratch_bytes += copies * SomeRows.num_elements(chunk, len(rows)) * chunk.dtype.itemsize
        if not optimizer.fused:
            found.scratch_bytes += _SCRATCH_TENSORS * chunk.num_bytes()
    return found


def to_read_ahead(chunks: Iterable[Chunk], by_rank: Sequence[Contributions], step: int) -> list[Part]:
    """What an update of these chunks in a step will read."""
    found = []
    for chunk in chunks:
        if gradients := gradient_parts(chunk, by_rank, step):
            found += [*gradients, chunk.weight, *chunk.state.values()]
    return found


def check_budget(
    shard: Shard,
    world_size: int,
    arrays: Mapping[str, StateArray],
    fused: bool = True,
    max_staleness: int = 0,
    kept_rows: Collection[int] = (),
) -> None:
    """Reserves what of a shard never leaves memory. Raises OutOfBudget, naming the chunk that is too large."""
    tier = shard.tier
    if not tier.limited:
        return
    small = 0
    per_element = [array for array in arrays.values() if array.per_element]
    largest: tuple[int, Chunk | None] = (0, None)
    for chunk in shard:
        trained = shard.manifest[chunk.parameter].has_state
        state = sum(chunk.num_bytes(array.dtype) for array in per_element) if trained else 0
        gradients = world_size * chunk.num_bytes(chunk.accumulation_dtype) if trained else 0
        if trained:
            small += 8 * (len(arrays) - len(per_element))
        if chunk.num_bytes() < SMALL_BYTES:
            small += 2 * chunk.num_bytes() + state + (1 + max_staleness) * gradients
            continue
        # The first step has the state twice: torch's own, and where it stays.
        needed = 2 * chunk.num_bytes() + 2 * state + gradients
        if trained:
            needed += chunk.num_bytes() if world_size > 1 else 0
            needed += 0 if fused else _SCRATCH_TENSORS * chunk.num_bytes()
            needed += _ROW_COPIES * chunk.num_bytes() + state if chunk.parameter in kept_rows else 0
        if needed > largest[0]:
            largest = needed, chunk
    tier.reserve(shard, small, f"what is too small to spill of job's {len(shard)} chunks")
    size, widest = largest
    if widest is not None:
        tier.check_arrives(widest.num_bytes(widest.accumulation_dtype), widest.label)
        tier.check_fits(size, f"an update of {widest.label}" if arrays else widest.label)
