"""The order in which a model uses its parameters, as it was seen, and what that says of what comes next.

A *pass* is one outermost forward, or one backward. What it used, in order, is a path. Passes are told
apart by a key (which root module, in which mode, with inputs of which shapes; a backward by the forwards
that it is of), and for each key the last few different paths are kept. A pass follows one of them for as
long as it does what that path says. When something else is used, the trace looks in all paths of the key
for the place that the last uses fit best, and the pass goes on from there: a branch, another expert or one
more turn of a loop costs one surprise, and nothing is forgotten for it. Kinds of passes that are alike, as inputs
of other shapes are, form a family: what one of them did is looked through for the others too.

DeepSpeed's `PartitionedParameterCoordinator` keeps one trace and drops it when a module comes that it did
not expect; the rest of that iteration and all of the next one, which records, are not prefetched.
"""

import itertools
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, Protocol, TypeVar


class Item(Hashable, Protocol):
    """What a trace is of: a parameter."""

    numel: int


T = TypeVar("T", bound=Item)

KEYS = 64
"""How many kinds of passes are remembered, those used last."""

PATHS = 8
"""How many different paths of one kind of pass are remembered, those taken last."""

_CONTEXT = 8
"""How many uses back two places are compared."""

_CANDIDATES = 64
"""How many places are compared at one surprise."""


class Path(Generic[T]):
    """One pass as it was seen.

    items: what was used, in order.
    gaps: seconds of compute before each use, since the one before; as many as items.
    lead: how many seconds before its use an item has to be asked for so that it and what follows are
        there in time, and `clock`, the seconds of compute up to each use; see `trainer.pace`.
    then: the path of the same kind of pass that came after this one when it was taken last.
    next_of_family: the path of the same family that did.
    backward: the path of the backward that came right after this forward.
    seen: whether a pass took it; else it is a guess.
    """

    __slots__ = (
        "_before",
        "_places",
        "backward",
        "clock",
        "gaps",
        "items",
        "lead",
        "next_of_family",
        "number",
        "seen",
        "then",
    )

    _numbers = itertools.count()

    def __init__(self, items: Sequence[T], gaps: Sequence[float] | None = None, *, seen: bool = True) -> None:
        self.items = list(items)
        self.gaps = list(gaps) if gaps is not None else [0.0] * len(self.items)
        self.lead: list[float] = []
        self.clock: list[float] = []
        self.then: Path[T] | None = None
        self.next_of_family: Path[T] | None = None
        self.backward: Path[T] | None = None
        self.seen = seen
        self.number = next(Path._numbers)
        self._places: dict[T, list[int]] | None = None
        self._before: list[int] | None = None

    def places(self, item: T) -> Sequence[int]:
        """The indices at which an item is used, ascending."""
        if self._places is None:
            self._places = {}
            for index, used in enumerate(self.items):
                self._places.setdefault(used, []).append(index)
        return self._places.get(item, ())

    def next_place(self, item: T, start: int) -> int | None:
        """The first index from `start` on at which an item is used."""
        places = self.places(item)
        found = bisect_left(places, start)
        return places[found] if found < len(places) else None

    def elements_before(self, index: int) -> int:
        """How many elements the items before an index have, together."""
        if self._before is None:
            self._before = [0, *itertools.accumulate(item.numel for item in self.items)]
        return self._before[index]


class Trace(Generic[T]):
    """Follows the passes of one model. Used by one thread at a time.

    surprises: how often a pass did not do what its path said.
    repaired: how many new paths came of that.
    """

    def __init__(self) -> None:
        self.surprises = 0
        self.repaired = 0
        self._kinds: OrderedDict[Hashable, list[Path[T]]] = OrderedDict()
        # The last different paths of kinds of passes that are alike, the one taken last at the end.
        self._families: OrderedDict[Hashable, list[Path[T]]] = OrderedDict()
        self._family: list[Path[T]] = []
        self._key: Hashable = None
        self._latest: dict[Hashable, Path[T]] = {}
        self._path: Path[T] = Path((), seen=False)
        self._next = 0
        # Where the pass was before a jump that nothing but the item itself spoke for.
        self._doubted: tuple[Path[T], int] | None = None
        self._seen: list[T] = []
        self._gaps: list[float] = []
        self._surprised = False
        self.running = False

    # ------------------------------------------------------------ passes

    def begin(self, key: Hashable, guess: Callable[[], Sequence[T]], family: Hashable = None) -> None:
        """A pass begins.

        guess: what it may use, for a kind of pass of which neither it nor its family was ever seen.
        family: what kinds of passes have in common that may take the same paths.
        """
        self._family = self._family_of(family)
        paths = self._kinds.get(key)
        if paths:
            # A kind of pass that alternates between paths has told which one comes after which.
            latest = self._latest[key]
            self._path = latest.then or latest
            self._kinds.move_to_end(key)
        elif self._family:
            recent = self._family[-1]
            self._path = Path((recent.next_of_family or recent).items, seen=False)
        else:
            self._path = Path(guess(), seen=False)
        self._key = key
        self._next = 0
        self._doubted = None
        self._seen, self._gaps = [], []
        self._surprised = False
        self.running = True

    def use(self, item: T, gap: float = 0.0) -> bool:
        """The pass uses an item, `gap` seconds of compute after the one before. Whether that was expected."""
        self._seen.append(item)
        self._gaps.append(gap)
        path, place = self._path, self._next
        if place < len(path.items) and path.items[place] is item:
            self._next = place + 1
            self._doubted = None
            return True
        self._surprised = True
        if self._doubted is not None:
            path, place = self._doubted
            if place < len(path.items) and path.items[place] is item:
                # That jump was one use out of order; the pass goes on where it was.
                self._path, self._next, self._doubted = path, place + 1, None
                return False
        # A guess that was wrong surprises nobody.
        self.surprises += self._path.seen
        self._repair(item)
        return False

    def end(self, *, complete: bool = True) -> Path[T] | None:
        """The pass is over; the path that it took.

        complete: whether it came to its end. One that broke off tells nothing new, and None is returned.
        """
        if not self.running:
            return None
        self.running = False
        if not complete or not self._seen:
            return None
        path = self._path_taken()
        previous = self._latest.get(self._key)
        if previous is not None:
            previous.then = path
        self._latest[self._key] = path
        self._join_family(path)
        return path

    def _path_taken(self) -> Path[T]:
        paths = self._kinds.setdefault(self._key, [])
        if not self._surprised and self._path.seen and self._next == len(self._path.items):
            path = self._path
        else:
            known = (path for path in paths if path.items == self._seen)
            found = next(known, None)
            if found is None:
                if paths:
                    self.repaired += 1
                path = Path(self._seen, self._gaps)
                paths.append(path)
                self._forget()
                return path
            path = found
        # Half of what was known, half of what was seen: machines have good and bad moments.
        path.gaps = [(old + new) / 2 for old, new in zip(path.gaps, self._gaps, strict=True)]
        # Last taken, last forgotten.
        paths.remove(path)
        paths.append(path)
        return path

    def _forget(self) -> None:
        paths = self._kinds[self._key]
        self._kinds.move_to_end(self._key)
        for gone in paths[:-PATHS]:
            for path in paths:
                if path.then is gone:
                    path.then = None
        del paths[:-PATHS]
        while len(self._kinds) > KEYS:
            key, _ = self._kinds.popitem(last=False)
            self._latest.pop(key, None)

    # ------------------------------------------------------------ families

    def _family_of(self, key: Hashable) -> list[Path[T]]:
        if key is None:
            return []
        family = self._families.setdefault(key, [])
        self._families.move_to_end(key)
        if len(self._families) > KEYS:
            self._families.popitem(last=False)
        return family

    def _join_family(self, path: Path[T]) -> None:
        """Puts a path that was taken in place of one with the same items, and last."""
        family = self._family
        alike = next((known for known in family if known is path or known.items == path.items), None)
        previous = family[-1] if family else None
        model = alike or previous
        if path.backward is None and model is not None and model.backward is not None:
            path.backward = Path(model.backward.items, seen=False)
        if alike is not None:
            path.next_of_family = alike.next_of_family
            family.remove(alike)
        family.append(path)
        gone = [alike] if alike is not None and alike is not path else []
        gone += family[:-PATHS]
        del family[:-PATHS]
        # Only what is in the family is referred to: else each path would keep all that came after it.
        for known in family:
            if any(known.next_of_family is other for other in gone):
                known.next_of_family = path if known.next_of_family is alike else None
        for other in gone:
            other.next_of_family = None
        if previous is not None:
            (path if previous is alike else previous).next_of_family = path

    # ------------------------------------------------------------ repair

    def _repair(self, item: T) -> None:
        """Goes to the place that the last uses fit best; stays where it is if nothing else uses the item."""
        best: tuple[int, bool, int] | None = None
        chosen: tuple[Path[T], int] | None = None
        others = itertools.chain(reversed(self._kinds.get(self._key, ())), reversed(self._family))
        paths = dict.fromkeys(itertools.chain((self._path,), others))
        left = _CANDIDATES
        for path in paths:
            here = path is self._path
            places = path.places(item)
            # The nearest first: those ahead, then those behind.
            start = bisect_left(places, self._next) if here else 0
            for place in itertools.chain(places[start:], reversed(places[:start])):
                if left == 0:
                    break
                left -= 1
                ahead = here and place >= self._next
                fit = (self._fit(path, place), ahead, -abs(place - self._next))
                if best is None or fit > best:
                    best, chosen = fit, (path, place)
        if best is None or chosen is None:
            return
        self._doubted = (self._path, self._next) if best[0] == 0 else None
        path, place = chosen
        self._path, self._next = path, place + 1

    def _fit(self, path: Path[T], place: int) -> int:
        """How many of the uses just before agree with what comes before a place."""
        most = min(_CONTEXT, place, len(self._seen) - 1)
        for back in range(1, most + 1):
            if path.items[place - back] is not self._seen[-1 - back]:
                return back - 1
        return most

    # ------------------------------------------------------------ what comes

    @property
    def path(self) -> Path[T]:
        """What the running pass follows."""
        return self._path

    @property
    def place(self) -> int:
        """The index in `path` of the next use."""
        return self._next

    @property
    def seen(self) -> Sequence[T]:
        """What the running pass used so far."""
        return self._seen

    def paths(self, key: Hashable) -> Sequence[Path[T]]:
        """Those remembered of a kind of pass, the one taken last at the end."""
        return self._kinds.get(key, ())
