"""Sessions: one trainer process's lease on a job, and who of the trainers is lost."""

import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from protos.sizes import format_bytes
from ps.errors import Conflict, InvalidRequest, RankLost, ServerFull, SessionEnded
from ps.links import Chosen, GrpcLink
from ps.monitor import Monitor, Patience

_MAX_ID_CHARS = 200


@dataclass(eq=False)
class Session:
    """The lease of one trainer process. Times are of the monotonic clock, in seconds."""

    job: str
    rank: int
    world_size: int
    incarnation: str
    read_only: bool
    lease_seconds: float
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    owner: bytes = b""
    """Of a server with tokens: who opened it, and is the only one that may use it."""
    opened_at: float = field(default_factory=time.monotonic)
    last_seen: float = field(default_factory=time.monotonic)
    # Time in which nobody could be heard, as the server itself was stopped or starved.
    deaf_seconds: float = 0.0
    ended: str | None = None
    """Why it ended; None while it lives."""
    chosen: Chosen = field(default_factory=lambda: Chosen(GrpcLink()))
    """The link that carries its bytes."""
    on_end: set[Callable[[], None]] = field(default_factory=set)
    """What gives back memory that the trainer was about to fill, and ends its streams. Called with the job's monitor
    held."""
    inflight_bytes: int = 0
    """Of pushes that are arriving."""
    _inflight_lock: threading.Lock = field(default_factory=threading.Lock)

    def check(self) -> None:
        """Raises SessionEnded unless the session is alive."""
        if self.ended is not None:
            raise SessionEnded(f"this session (rank {self.rank} of job {self.job!r}) has ended: {self.ended}")

    def touch(self) -> None:
        """Any call of a session renews its lease."""
        self.check()
        self.last_seen = time.monotonic()
        self.deaf_seconds = 0.0

    def expect(self, num_bytes: int, limit: int | None = None) -> None:
        """So many bytes more, or fewer, are arriving. Raises ServerFull for more than `limit` of them together."""
        with self._inflight_lock:
            if limit is not None and self.inflight_bytes + num_bytes > limit:
                raise ServerFull(
                    f"{format_bytes(num_bytes)} were to be pushed at once, with {format_bytes(self.inflight_bytes)} of "
                    f"this session arriving already, and it may have {format_bytes(limit)} on their way: start the "
                    "server with a larger --max-inflight"
                )
            self.inflight_bytes += num_bytes

    @property
    def seconds_silent(self) -> float:
        return time.monotonic() - self.last_seen

    @property
    def who(self) -> str:
        return "a reader" if self.read_only else f"rank {self.rank}/{self.world_size}"


class Sessions:
    """The sessions of one job. Every method expects the job's monitor to be held.

    max_sessions: that the server may have, of all jobs.
    on_end: called once with each session that ends, for whatever reason.
    """

    def __init__(
        self,
        job: str,
        lease_seconds: float,
        max_sessions: int,
        monitor: Monitor,
        on_end: Callable[[Session], None],
    ) -> None:
        self._job = job
        self._lease_seconds = lease_seconds
        self._max_sessions = max_sessions
        # Trainers have to find a place, too.
        self._max_readers = max(1, max_sessions // 2)
        self._monitor = monitor
        self._on_end = on_end
        self._ranks: dict[int, Session] = {}
        self._readers: dict[str, Session] = {}
        # The last session of a rank that ended without a successor.
        self._lost: dict[int, Session] = {}
        # Trainers that were refused since the present group formed: (rank, world size, when).
        self._refused: tuple[int, int, float] | None = None

    def open(self, rank: int, world_size: int, incarnation: str, read_only: bool, patience: Patience) -> Session:
        """A new session. It fences an older one of the same rank.

        Raises InvalidRequest, and Conflict when living trainers state another world size.
        """
        if not incarnation or len(incarnation) > _MAX_ID_CHARS:
            raise InvalidRequest(f"incarnation has to have 1 to {_MAX_ID_CHARS} characters")
        if not read_only:
            if not 1 <= world_size <= self._max_sessions:
                raise InvalidRequest(
                    f"world size has to be 1 to {self._max_sessions}, not {world_size}: that is how many sessions this "
                    "server may have (--max-sessions)"
                )
            if rank >= world_size:
                raise InvalidRequest(f"rank {rank} does not exist in a world of size {world_size}")
            self._wait_for_world(rank, world_size, patience)
        session = Session(self._job, rank, world_size, incarnation, read_only, self._lease_seconds)
        if read_only:
            if len(self._readers) >= self._max_readers:
                raise ServerFull(
                    f"job {self._job!r} has {self._max_readers} read-only sessions, the most it may have: half of "
                    "--max-sessions"
                )
            self._readers[session.id] = session
            return session
        if rank in self._ranks:
            self._end(self._ranks[rank], f"a newer trainer took over rank {rank}")
        self._lost.pop(rank, None)
        self._ranks[rank] = session
        self._monitor.changed()
        return session

    def _wait_for_world(self, rank: int, world_size: int, patience: Patience) -> None:
        """Waits for the leases of a former group; one that is renewed meanwhile is no former group."""
        arrived = time.monotonic()

        def others() -> list[Session]:
            return [s for s in self._ranks.values() if s.world_size != world_size]

        def give_up() -> None:
            self.expire()
            for other in others():
                if other.last_seen > arrived:
                    self._refused = (rank, world_size, time.monotonic())
                    self._monitor.changed()
                    raise Conflict(
                        f"trainers disagree on world size: rank {other.rank} says {other.world_size}, "
                        f"this trainer (rank {rank}) says {world_size}"
                    )

        self._monitor.wait_until(
            lambda: not others(),
            patience,
            lambda: (
                f"the leases of {len(others())} trainers of a former run of job {self._job!r} "
                f"with world size {others()[0].world_size} to end (this one has {world_size})"
            ),
            give_up,
        )

    def close(self, session: Session) -> None:
        if session.ended is None:
            self._end(session, "its trainer closed it")

    def expire(self, deaf_seconds: float = 0.0) -> None:
        """Ends the sessions whose lease ran out; time in which the server heard nobody does not count."""
        for session in self.living():
            session.deaf_seconds += deaf_seconds
            silent = session.seconds_silent - session.deaf_seconds
            if silent > session.lease_seconds:
                self._end(session, f"its lease ended after {silent:.1f} s without a sign of life")

    def living(self) -> list[Session]:
        return [*self._ranks.values(), *self._readers.values()]

    def by_rank(self) -> dict[int, Session]:
        return dict(self._ranks)

    def trainers(self, world_size: int) -> list[Session] | None:
        """The sessions by rank, or None while one is missing."""
        if any(rank not in self._ranks for rank in range(world_size)):
            return None
        return [self._ranks[rank] for rank in range(world_size)]

    def check_group(self, session: Session) -> None:
        """Raises RankLost when a trainer that `session` worked with is gone.

        One that fell silent before `session` began belongs to a former run, and its successor may still
        be on the way.
        """
        session.check()
        if session.read_only:
            return
        for rank, lost in sorted(self._lost.items()):
            if rank < session.world_size and lost.last_seen > session.opened_at:
                raise RankLost(f"rank {rank} of job {self._job!r} is lost: {lost.ended}")

    def check_world(self, session: Session) -> None:
        """Raises Conflict when a rank is missing and a trainer with another world size was refused."""
        if self._refused is None or self.trainers(session.world_size) is not None:
            return
        rank, world_size, when = self._refused
        if when > session.opened_at:
            raise Conflict(
                f"trainers disagree on world size: rank {rank} says {world_size}, "
                f"this trainer (rank {session.rank}) says {session.world_size}"
            )

    def _end(self, session: Session, why: str) -> None:
        session.ended = why
        if session.read_only:
            self._readers.pop(session.id, None)
        elif self._ranks.get(session.rank) is session:
            del self._ranks[session.rank]
            self._lost[session.rank] = session
        self._on_end(session)
        self._monitor.changed()
