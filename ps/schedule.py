"""When each chunk of a shard is used next: the cycle of training, and where in it everybody is.

An iteration at step s is what trainers do in their order (pulls at version s, gradients of step s), then
norms if there are any, then the update of every chunk right before the next iteration pulls it: trainers wait for
updates one chunk after the other. The order of the first is what a trainer stated (`Plan`), else the order of its
last iteration as the server saw it, else forwards through the manifest and back. A chunk that was updated right
after its gradient, by an announced step, is expected to be so again.

Times are integers: `STEP` for each step, and two for each place within it.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Literal

from ps.chunk import Chunk
from ps.plan import Plan
from ps.tier import NEVER

Kind = Literal["pull", "gradient"]
Use = tuple[Kind, Chunk]

STEP = 1 << 40
NORM = 1 << 38
LAST = 1 << 39
"""Within an iteration: when norms are computed, and when it is known that nothing comes after."""

_MAX_RECORDED = 1 << 20
"""Uses of one iteration that are remembered."""


class _Follower:
    """Where a trainer is: the next use in the order, at a step; and what it has done in this iteration."""

    def __init__(self) -> None:
        self.step = -1
        self.place = 0
        self.seen: list[Use] = []


class Schedule:
    """The schedule of one shard.

    It decides in which order chunks are updated and, in a tier with a limit, what is in memory. Neither
    changes any result, so it needs no lock, and may be wrong.
    """

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self._chunks = list(chunks)
        self._index = {chunk: place for place, chunk in enumerate(self._chunks)}
        self._followers: dict[str, _Follower] = {}
        self._step = 0
        self._place = 0
        self._has_norms = False
        self._normed: tuple[int, int] = (-1, 0)
        forward: list[Use] = [("pull", chunk) for chunk in self._chunks]
        backward: list[Use] = [(kind, c) for c in reversed(self._chunks) for kind in ("pull", "gradient")]
        self._stated = False
        # Those that the last step updated as soon as their gradients were final.
        self._early: set[Chunk] = set()
        self._set_order([*forward, *backward])

    def forecast(self) -> None:
        """Has chunks know when their parts are used next."""
        for chunk in self._chunks:
            for kind, uses in (
                ("weight", self._weight),
                ("copy", self._copy),
                ("state", self._update),
                ("gradient", self._gradient),
            ):
                chunk.forecasts[kind] = lambda chunk=chunk, uses=uses: uses(chunk)  # type: ignore[misc]

    # ------------------------------------------------------------ what happens

    def follow(self, plan: Plan, chunks_of: Sequence[Sequence[Chunk]]) -> None:
        """A trainer states its order. chunks_of: the chunks here of each parameter."""
        order: list[Use] = [(use.kind, chunk) for use in plan.uses for chunk in chunks_of[use.parameter]]
        if order:
            self._stated = True
            self._set_order(order)

    def forget(self, session_id: str) -> None:
        """A trainer is gone."""
        self._followers.pop(session_id, None)

    def used(self, session_id: str, kind: Kind, chunk: Chunk, step: int) -> bool:
        """A trainer pulls a chunk, or its gradient comes. Whether an iteration began, so that times changed."""
        follower = self._followers.setdefault(session_id, _Follower())
        began = step > follower.step
        if began:
            if not self._stated and follower.seen and follower.seen != self._order:
                self._set_order(follower.seen)
            follower.step, follower.place, follower.seen = step, 0, []
        if places := self._places.get((kind, chunk)):
            found = bisect_left(places, follower.place)
            # Where it does not come again, the order begins anew: evaluations go forward often at one step.
            follower.place = places[found if found < len(places) else 0] + 1
        if len(follower.seen) < _MAX_RECORDED:
            follower.seen.append((kind, chunk))
        self._step, self._place = min((f.step, f.place) for f in list(self._followers.values()))
        return began

    def norm(self, step: int, chunk: Chunk | None) -> None:
        """The norm of a chunk is being computed; None when all of them are."""
        self._has_norms = True
        self._normed = (step, len(self._chunks) if chunk is None else self._index[chunk])

    def updated(self, chunk: Chunk, *, early: bool) -> None:
        """A step has updated the chunk: as soon as its gradient was final, or after all of them."""
        (self._early.add if early else self._early.discard)(chunk)

    # ------------------------------------------------------------ what is to come

    def update_order(self) -> list[Chunk]:
        """All chunks, in the order in which the next iteration pulls them; what it does not pull comes last."""
        return list(self._update_place)

    def update_place(self, chunk: Chunk) -> int:
        """The chunk's place in that order."""
        return self._update_place[chunk]

    def is_early(self, chunk: Chunk) -> bool:
        """Whether the chunk will probably be updated right after its gradient."""
        return chunk in self._early

    def upcoming(self, session_id: str, max_bytes: int) -> Iterator[Use]:
        """What a trainer uses next in this iteration, up to so many bytes."""
        follower = self._followers.get(session_id)
        if follower is None:
            return
        for place in range(follower.place, len(self._order)):
            kind, chunk = self._order[place]
            max_bytes -= chunk.num_bytes()
            if max_bytes < 0:
                return
            yield kind, chunk

    def _weight(self, chunk: Chunk) -> float:
        # Where there are copies, they are what is pulled.
        pull = NEVER if chunk.copies else self._next("pull", chunk)
        return min(pull, self._update(chunk))

    def _copy(self, chunk: Chunk) -> float:
        pull = self._next("pull", chunk)
        # An update makes it anew.
        return pull if pull < self._update(chunk) else NEVER

    def _gradient(self, chunk: Chunk) -> float:
        step = chunk.version
        update = self._update(chunk)
        if self._has_norms and (step, self._index[chunk]) >= self._normed:
            update = step * STEP + NORM + self._index[chunk]
        return min(self._next("gradient", chunk), update)

    def _update(self, chunk: Chunk) -> float:
        if chunk in self._early and (places := self._places.get(("gradient", chunk))):
            return chunk.version * STEP + _used_at(places[-1])
        following = (chunk.version + 1) * STEP
        if places := self._places.get(("pull", chunk)):
            return following + _used_at(places[0]) - 1
        return following + LAST + self._update_place[chunk]

    def _next(self, kind: Kind, chunk: Chunk) -> float:
        """The next pull of a chunk, or its next gradient."""
        places = self._places.get((kind, chunk))
        if not places:
            # Nobody has used it so far: it may not be needed at all.
            return (self._step + 1) * STEP + NORM
        if chunk.version <= self._step:
            found = bisect_left(places, self._place)
            if found < len(places):
                return self._step * STEP + _used_at(places[found])
        return max(self._step + 1, chunk.version) * STEP + _used_at(places[0])

    def _set_order(self, order: Sequence[Use]) -> None:
        places: dict[Use, list[int]] = {}
        for place, use in enumerate(order):
            places.setdefault(use, []).append(place)
        never = [len(order)]
        by_pull = sorted(self._chunks, key=lambda chunk: places.get(("pull", chunk), never)[0])
        self._update_place = {chunk: place for place, chunk in enumerate(by_pull)}
        self._order, self._places = list(order), places


def _used_at(place: int) -> int:
    """The time of a place; just before it is that of an update which it waits for."""
    return 2 * place + 1
