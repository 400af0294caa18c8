"""A job's state on one server: the manifest, and the chunks of it that are placed here."""

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from protos.layout import ChunkGrid, digest, place_all
from ps.chunk import Chunk
from ps.errors import Conflict, InvalidRequest
from ps.flush import Flush
from ps.home import IN_MEMORY, Home
from ps.monitor import Patience
from ps.optimizer import ChunkOptimizer
from ps.schedule import Schedule
from ps.store import CommitKey, OptimizerGroup, OptimizerSpec, StoredParameter
from ps.store.disks import spread
from ps.tier import Area, Tier

FLUSH_SECONDS = 3600.0
"""How long an update waits for a disk that takes a chunk of a commit. A disk that is only slow is waited for."""


class Shard:
    """All chunks of a job that one server holds.

    step: optimizer steps that all trainers agreed on; the version that every chunk will reach.
    updated_step: the version that every chunk has reached.
    newest_version: the version that some chunk has reached, or is about to: `step`, or the next one while an
        announced step updates chunks whose gradients are final.
    needed_version: the newest version that somebody waited for, which updates that are put off come to.
    failure, failed_at: why a step failed, and when on the monotonic clock. The state is of no use then.
    spec: the optimizer as stated, or as a generation has it.
    assigned: whether a trainer has written weights or state since the last step or commit. It may have more of them
        to write, here or on another server.
    metadata: what the trainer gave to the last commit.
    generation: the commit whose generation memory is equal to, or None. It may still be being written.
    flush: of the commit that is being written, or None.
    restore_id: of the restore that the state stems from, or "".
    tier, areas: what counts the bytes of chunks, and where those go that do not fit: on each disk the chunks that
        a generation would have there. No areas if all fit.
    num_bytes: of all weights.
    schedule: when chunks are used next.
    """

    def __init__(
        self,
        index: int,
        num_shards: int,
        manifest: Sequence[StoredParameter],
        step: int = 0,
        tier: Tier = IN_MEMORY,
        areas: Sequence[Area] = (),
    ) -> None:
        self.index = index
        self.num_shards = num_shards
        self.manifest = tuple(manifest)
        self.step = step
        self.updated_step = step
        self.newest_version = step
        self.needed_version = step
        self.failure: str | None = None
        self.failed_at = 0.0
        self.spec: OptimizerSpec | None = None
        self.optimizer: ChunkOptimizer | None = None
        self.assigned = False
        self.metadata = ""
        self.generation: CommitKey | None = None
        self.flush: Flush | None = None
        self.restore_id = ""
        self.tier = tier
        self.areas = tuple(areas)
        self._placement = place_all((p.shape for p in self.manifest), num_shards)
        self.placement_digest = digest(self._placement)
        self._chunks: dict[tuple[int, int], Chunk] = {}
        self._of_parameter: list[list[Chunk]] = []
        disks = spread((p.shape for p in self.manifest), index, num_shards, max(1, len(self.areas)))
        for number, parameter in enumerate(self.manifest):
            grid = ChunkGrid.of(parameter.shape)
            here: list[Chunk] = []
            for chunk, place in enumerate(self._placement[number]):
                if place != index:
                    continue
                label = f"chunk {chunk} of {parameter.name!r}"
                area = self.areas[disks[number, chunk]] if self.areas else None
                home = Home(tier, label, area, parameter, chunk)
                here.append(Chunk(number, chunk, label, grid.chunk_shape(chunk), parameter.dtype, step, home))
                self._chunks[number, chunk] = here[-1]
            self._of_parameter.append(here)
        for area in self.areas:
            area.on_loss = self.fail
        self.num_bytes = sum(chunk.num_bytes() for chunk in self)
        self.schedule = Schedule(list(self))
        if tier.limited:
            self.schedule.forecast()

    def close(self) -> None:
        """Gives back the memory and the spill files. Nobody may wait for anything of it any more."""
        for chunk in self:
            chunk.discard()
        self.tier.unreserve(self)
        for area in self.areas:
            area.drop()

    def fail(self, why: str) -> None:
        self.failed_at = time.monotonic()
        self.failure = why

    @property
    def at_rest(self) -> bool:
        """Whether all chunks are at one version and none is about to leave it."""
        return self.updated_step == self.newest_version

    def __iter__(self) -> Iterator[Chunk]:
        """The chunks in the order of the manifest."""
        return iter(self._chunks.values())

    def __len__(self) -> int:
        return len(self._chunks)

    def find(self, parameter: int, chunk: int) -> Chunk:
        """Raises InvalidRequest, saying whether the chunk is elsewhere or nowhere."""
        found = self._chunks.get((parameter, chunk))
        if found is not None:
            return found
        if parameter >= len(self.manifest):
            raise InvalidRequest(f"there is no parameter {parameter}: the manifest has {len(self.manifest)} parameters")
        name = self.manifest[parameter].name
        places = self._placement[parameter]
        if chunk >= len(places):
            raise InvalidRequest(f"there is no chunk {chunk} of {name!r}: it has {len(places)} chunks")
        raise InvalidRequest(f"chunk {chunk} of {name!r} is on shard {places[chunk]}, this is shard {self.index}")

    def select(self, parameters: Iterable[int]) -> list[Chunk]:
        """The chunks here of some parameters, in the order of the manifest; of all if none is named."""
        wanted = set(parameters)
        if not wanted:
            return list(self)
        if max(wanted) >= len(self.manifest):
            raise InvalidRequest(
                f"there is no parameter {max(wanted)}: the manifest has {len(self.manifest)} parameters"
            )
        return [chunk for parameter in sorted(wanted) for chunk in self._of_parameter[parameter]]

    def missing_weights(self) -> int:
        """How many chunks have never got a weight."""
        return sum(not chunk.has_weight for chunk in self)

    def check_weights(self) -> None:
        """Raises Conflict while a chunk has no weight."""
        if missing := self.missing_weights():
            first = next(chunk.label for chunk in self if not chunk.has_weight)
            raise Conflict(
                f"{missing} of {len(self)} chunks have no weight yet ({first} is the first); rank 0 has to "
                "write every weight before training begins"
            )

    def stated_optimizer(self) -> OptimizerSpec | None:
        """The optimizer with the options of the last step."""
        if self.spec is None or self.optimizer is None:
            return self.spec
        groups = zip(self.optimizer.options.stated, self.spec.groups, strict=True)
        return replace(self.spec, groups=tuple(OptimizerGroup(options, group.parameters) for options, group in groups))

    def set_trainable(self, manifest: Sequence[StoredParameter]) -> None:
        """Which parameters are trained may change while a job is open; all else of a manifest may not.

        What was trained once may have optimizer state, and stays so.
        """
        trainable = {p.name for p in manifest if p.trainable}
        self.set_trained(i for i, p in enumerate(self.manifest) if p.name in trainable)

    def set_trained(self, parameters: Iterable[int]) -> None:
        """These are trained, too, from here on."""
        more = set(parameters)
        self.manifest = tuple(
            replace(p, trainable=True) if i in more and not p.trainable else p for i, p in enumerate(self.manifest)
        )

    def chunks_of(self) -> list[list[Chunk]]:
        """The chunks here of each parameter, in the order of the manifest."""
        return self._of_parameter

    @property
    def resident_bytes(self) -> int:
        return sum(chunk.resident_bytes for chunk in self)


@contextmanager
def at_liberty(shard: Shard, chunks: Sequence[Chunk], shard_lock: threading.RLock) -> Iterator[None]:
    """Holds the lock, at an instant when no commit still has to write one of these chunks. Raises Timeout.

    Nothing else in the block may take longer than a moment.
    """
    patience = Patience.of(FLUSH_SECONDS)
    while True:
        with shard_lock:
            flush = shard.flush
            if flush is None or not flush.holds(chunks):
                yield
                return
        flush.settle(chunks, patience)


def check_same_model(job: str, ours: Sequence[StoredParameter], theirs: Sequence[StoredParameter]) -> None:
    """Raises Conflict naming the first parameter, in the order of `theirs`, that differs.

    The order of the manifests and what is trainable do not matter.
    """
    known = {p.name: p for p in ours}
    for parameter in theirs:
        mine = known.get(parameter.name)
        if mine is None:
            raise Conflict(_differs(job, parameter.name, "the job does not have it"))
        for what in ("shape", "dtype", "kind"):
            has, wanted = getattr(mine, what), getattr(parameter, what)
            if has != wanted:
                difference = f"its {what} is {_text(has)} in the job and {_text(wanted)} in this model"
                raise Conflict(_differs(job, parameter.name, difference))
    stated = {p.name for p in theirs}
    for mine in ours:
        if mine.name not in stated:
            raise Conflict(_differs(job, mine.name, "this model does not have it"))


def _differs(job: str, name: str, difference: str) -> str:
    return (
        f"job {job!r} holds another model: parameter {name!r} differs, {difference}; "
        "open the job with the model it was created with, or choose another job name"
    )


def _text(value: object) -> str:
    return str(value).removeprefix("torch.")
