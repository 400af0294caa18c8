"""How long requests take and how long modules compute, and so when to ask."""

import itertools
import threading
from typing import TypeVar

from trainer.parameter import OffloadedParameter
from trainer.trace import Item, Path

_SAFETY = 1.5
"""How much earlier than it seems necessary something is asked for."""

_MEMORY_BYTES = 256 << 20
"""Of about how many bytes, those that came last, the speed is known."""

_REQUEST_SECONDS = 0.001
"""What a request costs besides its bytes."""

T = TypeVar("T", bound=Item)


class Pace:
    """Learns the speed of requests. `arrived` may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes = 0.0
        self._seconds = 0.0
        self.total_bytes = 0
        self.total_seconds = 0.0

    def arrived(self, nbytes: int, seconds: float) -> None:
        """A request of so many bytes took so long, not counting what it waited for the ones before it."""
        with self._lock:
            self.total_bytes += nbytes
            self.total_seconds += seconds
            forget = max(0.0, 1.0 - nbytes / _MEMORY_BYTES)
            self._bytes = self._bytes * forget + nbytes
            self._seconds = self._seconds * forget + max(seconds - _REQUEST_SECONDS, 0.0)

    def seconds(self, nbytes: int) -> float:
        """How long so many bytes will take; nothing is known before the first ones came."""
        return _REQUEST_SECONDS + nbytes * (self._seconds / self._bytes if self._bytes else 0.0)

    def prepare(self, path: Path[OffloadedParameter], after: float = 0.0) -> None:
        """Works out from how many seconds before its use on each item of a path has to be asked for.

        With `lead[i]` of an item that takes t seconds: t, or, if what follows needs it, so much more that
        the items after it are in time too: lead[i] = t + max(0, lead[i+1] - gaps[i+1]).

        after: the lead that is needed at the end of the path.
        """
        lead = after
        leads = []
        for item, gap in zip(reversed(path.items), itertools.chain((0.0,), reversed(path.gaps)), strict=False):
            lead = self.seconds(item.nbytes) + max(0.0, lead - gap)
            leads.append(lead)
        leads.reverse()
        path.lead = leads
        path.clock = list(itertools.accumulate(path.gaps))

    def is_due(self, seconds_until: float, lead: float, backlog_bytes: int) -> bool:
        """Whether something has to be asked for now.

        seconds_until: from the next time that one can ask to its use.
        backlog_bytes: asked for and not here yet.
        """
        return seconds_until <= _SAFETY * (lead + self.seconds(backlog_bytes))
