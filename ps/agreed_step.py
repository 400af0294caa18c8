"""A step whose options all trainers agree on: which of its chunks may be updated by now."""

from collections.abc import Iterable, Mapping, Sequence

from ps.chunk import Chunk
from ps.contributions import Contributions
from ps.gradient_edits import GradientEdit
from ps.optimizer import Options
from ps.shard import Shard


class AgreedStep:
    """Guarded by the job's monitor.

    A step that trainers ask for is complete from the beginning. One that they announced comes to that with
    the last rank's Step; until then, chunks become ready one by one.

    step: the version that it starts from.
    edits: what is done to the averaged gradients, by parameter. An announced step has none.
    contributions: by rank. They outlast their sessions until `end`.
    complete: whether every rank has asked for the step, so that all chunks may be updated.
    lost: why it will never be complete, or None.
    moved: whether a chunk has been updated, or is about to be.
    ended: whether it is over and nothing is left to do for it.
    """

    def __init__(self, shard: Shard, step: int, options: Options, contributions: Iterable[Contributions]) -> None:
        self.shard = shard
        self.step = step
        self.options = options
        self.edits: Mapping[int, Sequence[GradientEdit]] = {}
        self.contributions = tuple(contributions)
        self.complete = False
        self.lost: str | None = None
        self.moved = False
        self.ended = False
        self._seen: set[Chunk] = set()
        self._ready: list[Chunk] = []
        for each in self.contributions:
            each.hold()

    def look(self, chunks: Iterable[Chunk] | None = None) -> bool:
        """Finds chunks that have become final on every rank, among these or all. Whether there are any."""
        if chunks is None:
            # Of a rank that has asked for the step everything is final, so those of another one say more.
            finals = (c.final_chunks(self.step) for c in self.contributions if c.stepped != self.step)
            chunks = next(finals, [])
        new = [
            chunk
            for chunk in chunks
            if chunk not in self._seen and all(c.is_final(chunk, self.step) for c in self.contributions)
        ]
        self._seen.update(new)
        self._ready += new
        return bool(new)

    def take(self, min_bytes: int, max_bytes: int) -> list[Chunk]:
        """The chunks to update next, in the order in which trainers need them; each is handed out once.

        Of a step that is not complete nothing where it is less than `min_bytes`, and no more than about `max_bytes`,
        as those that are needed sooner come later. Where memory is limited in the order of their gradients instead:
        it is the same in every step, so that it is known what to read and what to keep.
        """
        if self.complete:
            return [chunk for chunk in self.shard.schedule.update_order() if chunk.version == self.step]
        if sum(chunk.num_bytes() for chunk in self._ready) < min_bytes:
            return []
        if not self.shard.tier.limited:
            self._ready.sort(key=self.shard.schedule.update_place)
        taken, size = 0, 0
        while taken < len(self._ready) and size < max_bytes:
            size += self._ready[taken].num_bytes()
            taken += 1
        chunks, self._ready = self._ready[:taken], self._ready[taken:]
        return chunks

    def end(self) -> None:
        """It needs no gradients any more."""
        if self.ended:
            return
        self.ended = True
        for each in self.contributions:
            each.drop()
