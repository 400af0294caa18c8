"""Calls and streams that are open: each occupies a thread, and nobody gets all of them."""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ps.errors import ServerFull
from ps.sessions import Session

PER_SESSION = 8
"""A trainer has two streams with each server, and at most a commit and one other call that waits."""

MAX_ENDED = 64
"""Streams whose session has ended are told so for a while. Of more than these the oldest are ended at once."""

_NEW_SESSIONS = "new sessions"
_MUTE = "mute"
"""Stand for the id of a session where there is none yet: calls that open one, and streams that have not said whose
they are. The latter cannot take the former's places."""

MAX_MUTE = 64

_SPARE = 64
"""Threads for calls that do not wait: heartbeats, status, health."""

_MUTE_SECONDS = 30.0
"""After which a stream that has not said whose it is, or whose session has ended, is ended."""


class Place:
    """One stream's. Ends it with `cancel` when it is of no use any more."""

    def __init__(self, places: "Places", cancel: Callable[[], None]) -> None:
        self._places = places
        self.cancel = cancel
        self.session: Session | None = None
        self.since = time.monotonic()

    def belongs_to(self, session: Session) -> None:
        """Whose stream it is, by what it said first. Raises ServerFull."""
        if self.session is None:
            self._places.give(self, session)

    def end(self) -> None:
        """Its session has ended; called with a job's monitor held."""
        self._places.ended(self)


class Places:
    """Every method may be called from any thread.

    sessions: how many may live at a time.
    """

    def __init__(self, sessions: int) -> None:
        self._limits = {_NEW_SESSIONS: sessions + _SPARE, _MUTE: MAX_MUTE}
        self.threads = sessions * PER_SESSION + sum(self._limits.values()) + MAX_ENDED + _SPARE
        self._lock = threading.Lock()
        self._taken: Counter[str] = Counter()
        self._streams: set[Place] = set()
        self._ended: deque[Place] = deque()

    @contextmanager
    def call(self, session_id: str = "") -> Iterator[None]:
        """The time of a call that may wait; of a session, or without one. Raises ServerFull."""
        key = session_id or _NEW_SESSIONS
        with self._lock:
            self._take(key)
        try:
            yield
        finally:
            with self._lock:
                self._give_back(key)

    @contextmanager
    def stream(self, cancel: Callable[[], None], session: Session | None = None) -> Iterator[Place]:
        """The time of a stream, which may say later whose it is. Raises ServerFull."""
        place = Place(self, cancel)
        with self._lock:
            self._take(_MUTE)
            self._streams.add(place)
        try:
            if session is not None:
                self.give(place, session)
            yield place
        finally:
            if place.session is not None:
                place.session.on_end.discard(place.end)
            with self._lock:
                self._streams.discard(place)
                self._give_back(_MUTE if place.session is None else place.session.id)
                if place in self._ended:
                    self._ended.remove(place)

    def give(self, place: Place, session: Session) -> None:
        with self._lock:
            self._take(session.id)
            self._give_back(_MUTE)
            place.session, place.since = session, time.monotonic()
        session.on_end.add(place.end)
        if session.ended is not None:
            self.ended(place)

    def ended(self, place: Place) -> None:
        with self._lock:
            place.since = time.monotonic()
            if place in self._streams and place not in self._ended:
                self._ended.append(place)
            superfluous = [self._ended.popleft() for _ in range(len(self._ended) - MAX_ENDED)]
        for each in superfluous:
            each.cancel()

    def expire(self) -> None:
        """Ends streams that never said whose they are, and those that outlive their session."""
        with self._lock:
            now = time.monotonic()
            mute = [
                place
                for place in self._streams
                if (place.session is None or place.session.ended is not None) and now - place.since > _MUTE_SECONDS
            ]
        for place in mute:
            place.cancel()

    def _take(self, key: str) -> None:
        taken = self._taken[key]
        if taken >= self._limits.get(key, PER_SESSION):
            whose = "this server has, of clients without a session," if key in self._limits else "this session has"
            raise ServerFull(f"{whose} {taken} calls and streams open, the most there may be; wait until one has ended")
        self._taken[key] += 1

    def _give_back(self, key: str) -> None:
        self._taken[key] -= 1
        if not self._taken[key]:
            del self._taken[key]
