"""What a pair is sending: how much of it there may be, and what is lent until it has left."""

import queue
import threading
from collections.abc import Callable

from protos import pair
from protos.pair import DEPTH, PARCEL_BYTES, Work
from ps.errors import Timeout
from ps.tier import Lent

_COPIED_BYTES = DEPTH * PARCEL_BYTES
_LENT_BYTES = 64 << 20
"""How much may be on its way: of what takes memory for that only, and of what is in memory anyway. A trainer is told of
all that a pull asked for in one message if there is room for all of it."""


class Leaving:
    """Parcels on their way to one trainer, in the order in which they are sent.

    A thread waits for them, so that nothing is lent for longer than it takes, whatever is asked for next.

    wait: returns when a parcel has left or never will: nobody reads its memory any more.
    """

    def __init__(self, kind: str, wait: Callable[[Work], None]) -> None:
        self._kind = kind
        self._wait = wait
        self._changed = threading.Condition()
        # Those that are about to be sent as well.
        self._num_bytes = 0
        # None behind the last.
        self._parcels: queue.SimpleQueue[tuple[Work, int, Lent | None] | None] = queue.SimpleQueue()
        self._closed = False
        self._waiter: threading.Thread | None = None

    def has_room(self, size: int, lent: Lent | None) -> bool:
        """For a parcel. lent: what it is of, if it is no copy."""
        limit = _COPIED_BYTES if lent is None else _LENT_BYTES
        return self._num_bytes == 0 or self._num_bytes + size <= limit

    def take_room(self, size: int, lent: Lent | None) -> None:
        """Waits until there is room for a parcel, which is then its own until it has left. Raises Timeout."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.has_room(size, lent), pair.MOVE_SECONDS):
                raise Timeout(f"the trainer took no parcel of the {self._kind} link within {pair.MOVE_SECONDS:g} s")
            self._num_bytes += size

    def give_room(self, size: int) -> None:
        """A parcel has left, or was not sent after all."""
        with self._changed:
            self._num_bytes -= size
            self._changed.notify_all()

    def add(self, work: Work, size: int, lent: Lent | None) -> None:
        """A parcel has been sent. lent: given back when it has left."""
        with self._changed:
            if not self._closed:
                self._parcels.put((work, size, lent))
                if self._waiter is None:
                    self._waiter = threading.Thread(target=self._wait_for_all, name=f"{self._kind} sent", daemon=True)
                    self._waiter.start()
                return
        self._wait_and_give_back(work, size, lent)

    def close(self) -> None:
        """Nothing comes any more, or whoever brings it waits for it. Safe to call twice."""
        with self._changed:
            self._closed = True
            self._parcels.put(None)

    def _wait_for_all(self) -> None:
        while (parcel := self._parcels.get()) is not None:
            self._wait_and_give_back(*parcel)
            # A local of an idle thread would keep what was sent last.
            del parcel

    def _wait_and_give_back(self, work: Work, size: int, lent: Lent | None) -> None:
        self._wait(work)
        if lent is not None:
            lent.give_back()
        self.give_room(size)
