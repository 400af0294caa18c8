"""Which part leaves memory first."""

import itertools
from typing import Protocol

from ps.tier.part import Part

_UNKNOWN = 1 << 100
"""Later than any use that can be foreseen, and sooner than never."""


class Policy(Protocol):
    """Ranks parts when they are used: what has the largest number leaves first."""

    def rank(self, part: Part) -> float: ...


class LeastRecentlyUsed:
    """What was used longest ago leaves first: the worst choice for a cyclic scan, here to compare with."""

    def __init__(self) -> None:
        self._clock = itertools.count()

    def rank(self, part: Part) -> float:
        return -float(next(self._clock))


class FarthestNextUse:
    """What is needed farthest in the future leaves first (Belady, 1966), as far as parts can tell.

    Training is a cycle, so they mostly can. Of parts whose future nobody knows the oldest stay: they were
    staged in the order in which they will be taken.
    """

    def __init__(self) -> None:
        self._clock = itertools.count()

    def rank(self, part: Part) -> float:
        if part.forecast is None:
            return _UNKNOWN + next(self._clock)
        return part.forecast()


def policy_named(name: str) -> Policy:
    """'plan' or 'lru'; ValueError for another name."""
    match name:
        case "plan":
            return FarthestNextUse()
        case "lru":
            return LeastRecentlyUsed()
    raise ValueError(f"{name!r} is not an eviction policy: choose 'plan' or 'lru'")
