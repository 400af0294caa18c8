"""Reads ahead along a sequence that is about to be gone through."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from ps.tier.part import Part
from ps.tier.tier import Tier

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """A window over a sequence whose parts have been asked for. Does nothing in a tier without a limit.

    parts_of: what one item of the sequence needs, asked when the window gets to it.
    """

    def __init__(self, tier: Tier, items: Sequence[T], parts_of: Callable[[T], Sequence[Part]]) -> None:
        self._tier = tier
        self._items = items
        self._parts_of = parts_of
        # Bytes of each item in the window, which ends before item `_next`.
        self._window: deque[int] = deque()
        self._next = 0
        self._window_bytes = 0

    def reached(self, place: int) -> None:
        """The items before this one are done with. To be called for one after the other."""
        if not self._tier.limited:
            return
        while len(self._window) > self._next - place:
            self._window_bytes -= self._window.popleft()
        # In stretches: what asking costs does not depend much on for how many.
        if 2 * self._window_bytes > self._tier.ahead_limit_bytes:
            return
        parts: list[Part] = []
        while self._next < len(self._items) and self._window_bytes <= self._tier.ahead_limit_bytes:
            item = self._parts_of(self._items[self._next])
            parts += item
            self._next += 1
            self._window.append(sum(part.size for part in item))
            self._window_bytes += self._window[-1]
        self._tier.ahead(parts)
