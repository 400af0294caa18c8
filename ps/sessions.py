"""Sessions: one trainer process's lease on a job, and the groups in which trainers come and end together."""

import threading
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from protos.sizes import format_bytes
from ps.errors import Conflict, InvalidRequest, RankLost, ServerFull, SessionEnded
from ps.links import Chosen, GrpcLink
from ps.monitor import Monitor, Patience

_MAX_ID_CHARS = 200

_MAX_AHEAD = 1 << 32
"""Groups that trainers may know of and a server not, which was restarted since. Nobody is to use up the numbers."""


@dataclass(eq=False)
class Group:
    """Trainers that work together: what a step waits for. They come together and end together.

    number: as shard 0 gave it.
    lost: why it has ended, or None.
    left: by rank, who closed its session. The others are told when they wait for it.
    """

    number: int
    world_size: int
    elastic: bool = False
    lost: str | None = None
    left: dict[int, "Session"] = field(default_factory=dict)


@dataclass(eq=False)
class Session:
    """The lease of one trainer process. Times are of the monotonic clock, in seconds."""

    job: str
    rank: int
    incarnation: str
    group: Group | None
    """None for a read-only session."""
    lease_seconds: float
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    owner: bytes = b""
    """Of a server with tokens: who opened it, and is the only one that may use it."""
    opened_at: float = field(default_factory=time.monotonic)
    last_seen: float = field(default_factory=time.monotonic)
    # Time in which nobody could be heard, as the server itself was stopped or starved.
    deaf_seconds: float = 0.0
    claimed: bool = True
    """False while its trainer was only told of it, by the answer to JoinGroup."""
    ended: str | None = None
    """Why it ended; None while it lives."""
    lost: str | None = None
    """Where it ended with its group: who was lost."""
    chosen: Chosen = field(default_factory=lambda: Chosen(GrpcLink()))
    """The link that carries its bytes."""
    on_end: set[Callable[[], None]] = field(default_factory=set)
    """What gives back memory that the trainer was about to fill, and ends its streams. Called with the job's monitor
    held."""
    inflight_bytes: int = 0
    """Of pushes that are arriving."""
    _inflight_lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def read_only(self) -> bool:
        return self.group is None

    @property
    def left(self) -> bool:
        """Whether its trainer closed it, so that it was not lost."""
        return self.group is not None and self.group.left.get(self.rank) is self

    @property
    def world_size(self) -> int:
        return 0 if self.group is None else self.group.world_size

    def check(self) -> None:
        """Raises SessionEnded unless the session is alive; RankLost where it ended because another trainer was lost."""
        if self.lost is not None:
            raise RankLost(self.lost)
        if self.ended is not None:
            raise SessionEnded(f"this session (rank {self.rank} of job {self.job!r}) has ended: {self.ended}")

    def touch(self) -> None:
        """Any call of a session renews its lease. What has ended stays so, but its trainer is known to live."""
        self.last_seen = time.monotonic()
        self.deaf_seconds = 0.0
        self.check()

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
    def is_silent(self) -> bool:
        """Whether the lease has run out; time in which the server heard nobody does not count."""
        return self.seconds_silent - self.deaf_seconds > self.lease_seconds

    @property
    def who(self) -> str:
        return "a reader" if self.read_only else f"rank {self.rank}/{self.world_size}"


class Sessions:
    """The sessions of one job. Every method expects the job's monitor to be held.

    max_sessions: that the server may have, of all jobs.
    number: of the newest group that was heard of.
    group: the present one, or the last.
    on_begin, on_end: called once with each session that begins, and that ends for whatever reason.
    """

    def __init__(
        self,
        job: str,
        lease_seconds: float,
        max_sessions: int,
        monitor: Monitor,
        on_begin: Callable[[Session], None],
        on_end: Callable[[Session], None],
    ) -> None:
        self.lease_seconds = lease_seconds
        self.max_sessions = max_sessions
        self.number = 0
        self.group: Group | None = None
        self._job = job
        # Trainers have to find a place, too.
        self._max_readers = max(1, max_sessions // 2)
        self._monitor = monitor
        self._on_begin = on_begin
        self._on_end = on_end
        self._ranks: dict[int, Session] = {}
        self._readers: dict[str, Session] = {}
        # Of the last group that was lost: their trainers are expected to join anew, as long as they are heard of.
        self._former: list[Session] = []

    # ------------------------------------------------------------ beginning

    def open(self, rank: int, world_size: int, incarnation: str, number: int) -> Session:
        """A trainer's new session, of the group of that number; or the one that was begun with the group. A newer group
        ends all sessions of an older one.

        Raises InvalidRequest, and RankLost for a group that has ended or that the trainer has left.
        """
        check_incarnation(incarnation)
        self.check_rank(rank, world_size)
        group = self._enter(number, world_size)
        present = self._ranks.get(rank)
        if present is not None and present.incarnation == incarnation and not present.claimed:
            present.claimed = True
            return present
        if present is not None:
            self._end(present, f"a newer trainer took over rank {rank}")
            assert group.lost is not None
            raise RankLost(group.lost)
        if rank in group.left:
            raise RankLost(f"rank {rank} of job {self._job!r} has left group {number}: {group.left[rank].ended}")
        return self._add(rank, incarnation, group)

    def begin(self, number: int, incarnations: Sequence[str], elastic: bool) -> list[Session]:
        """The sessions of a group that was just formed, by rank; none of them is claimed yet."""
        group = self._enter(number, len(incarnations))
        group.elastic = elastic
        sessions = [self._add(rank, incarnation, group) for rank, incarnation in enumerate(incarnations)]
        for session in sessions:
            session.claimed = False
        return sessions

    def open_reader(self, incarnation: str) -> Session:
        """A session that is of no group. Raises InvalidRequest and ServerFull."""
        check_incarnation(incarnation)
        if len(self._readers) >= self._max_readers:
            raise ServerFull(
                f"job {self._job!r} has {self._max_readers} read-only sessions, the most it may have: half of "
                "--max-sessions"
            )
        session = Session(self._job, 0, incarnation, None, self.lease_seconds)
        self._readers[session.id] = session
        self._on_begin(session)
        return session

    def _add(self, rank: int, incarnation: str, group: Group) -> Session:
        session = Session(self._job, rank, incarnation, group, self.lease_seconds)
        self._ranks[rank] = session
        self._on_begin(session)
        self._monitor.changed()
        return session

    def check_number(self, number: int) -> None:
        """Raises InvalidRequest for what cannot be the number of a group."""
        if not 1 <= number <= self.number + _MAX_AHEAD:
            raise InvalidRequest(
                f"{number} is no number of a group, which shard 0 gives (JoinGroup); this server is at {self.number}"
            )

    def _enter(self, number: int, world_size: int) -> Group:
        """The group of a number, which may be the first that this server hears of it."""
        group = self.group
        self.check_number(number)
        if number < self.number:
            raise RankLost(f"group {number} of the trainers of job {self._job!r} was followed by group {self.number}")
        if group is None or number > self.number:
            self.end_group("the trainers of the job joined anew, in a group that this one is not of")
            self.number = number
            group = self.group = Group(number, world_size)
            self._former.clear()
        if group.number != number or group.lost is not None:
            raise RankLost(group.lost or f"group {number} of the trainers of job {self._job!r} has ended")
        if group.world_size != world_size:
            raise InvalidRequest(f"group {number} has {group.world_size} trainers, not {world_size}")
        return group

    def wait_for_world(self, rank: int, world_size: int, patience: Patience) -> None:
        """Waits for the leases of a former group of another size; one that is renewed meanwhile is no former group.

        Raises Conflict then.
        """
        arrived = time.monotonic()

        def others() -> list[Session]:
            return [s for s in self._ranks.values() if s.world_size != world_size]

        def give_up() -> None:
            self.expire()
            for other in others():
                if other.last_seen > arrived:
                    raise disagreement(other.rank, other.world_size, rank, world_size)

        self._monitor.wait_until(
            lambda: not others(),
            patience,
            lambda: (
                f"the leases of {len(others())} trainers of a former run of job {self._job!r} "
                f"with world size {others()[0].world_size} to end (this one has {world_size})"
            ),
            give_up,
        )

    # ------------------------------------------------------------ ending

    def close(self, session: Session) -> None:
        """A trainer leaves in order: the others may go on as far as they can without it."""
        if session.ended is None and session.group is not None:
            session.group.left[session.rank] = session
        self._end(session, "its trainer closed it", alone=True)

    def expire(self, deaf_seconds: float = 0.0) -> None:
        """Ends the sessions whose lease ran out; time in which the server heard nobody does not count."""
        for session in [*self.living(), *self._former]:
            session.deaf_seconds += deaf_seconds
        for session in self.living():
            if session.ended is None and session.is_silent:
                silent = session.seconds_silent - session.deaf_seconds
                self._end(session, f"its lease ended after {silent:.1f} s without a sign of life")

    def give_up(self, session: Session, reason: str) -> None:
        """A trainer cannot go on and will join anew: so will all of its group."""
        self._end(session, f"its trainer joins the job anew: {reason}")

    def lose(self, session: Session, lost: str) -> None:
        """Another server has ended the session's group, as a trainer of it is lost; lost: what it said."""
        if session.ended is None and session.group is not None:
            self._end_all(session.group, "another trainer was lost, as another server says", lost)

    def end_group(self, why: str) -> None:
        """Ends the present group, of which nobody in particular was lost."""
        if self.group is not None and self.group.lost is None:
            self.group.lost = f"the group of trainers of job {self._job!r} has ended: {why}"
        for session in list(self._ranks.values()):
            self._end_one(session, why)

    def _end(self, session: Session, why: str, *, alone: bool = False) -> None:
        """Ends a session and, unless it leaves in order, its group."""
        if session.ended is not None:
            return
        group = session.group
        self._end_one(session, why)
        if group is None or alone:
            return
        lost = f"rank {session.rank} of job {self._job!r} is lost: {why}"
        self._end_all(group, f"rank {session.rank} was lost", lost)

    def _end_all(self, group: Group, why: str, lost: str) -> None:
        group.lost = lost
        for session in list(self._ranks.values()):
            if session.group is group:
                self._end_one(session, why, lost)

    def _end_one(self, session: Session, why: str, lost: str | None = None) -> None:
        session.ended, session.lost = why, lost
        if session.read_only:
            self._readers.pop(session.id, None)
        elif self._ranks.get(session.rank) is session:
            del self._ranks[session.rank]
            if session.group is not None and session.rank not in session.group.left:
                self._former.append(session)
        self._on_end(session)
        self._monitor.changed()

    # ------------------------------------------------------------ who is there

    def living(self) -> list[Session]:
        return [*self._ranks.values(), *self._readers.values()]

    def by_rank(self) -> dict[int, Session]:
        return dict(self._ranks)

    def trainers(self, world_size: int) -> list[Session] | None:
        """The sessions by rank, or None while one is missing."""
        if any(rank not in self._ranks for rank in range(world_size)):
            return None
        return [self._ranks[rank] for rank in range(world_size)]

    def expected(self) -> list[Session]:
        """Of the present group or the last one, those whose trainers live and did not leave."""
        return [*self._ranks.values(), *(session for session in self._former if not session.is_silent)]

    def check_rank(self, rank: int, world_size: int) -> None:
        """Raises InvalidRequest."""
        if not 1 <= world_size <= self.max_sessions:
            raise InvalidRequest(
                f"world size has to be 1 to {self.max_sessions}, not {world_size}: that is how many sessions this "
                "server may have (--max-sessions)"
            )
        if rank >= world_size:
            raise InvalidRequest(f"rank {rank} does not exist in a world of size {world_size}")

    def check_group(self, session: Session, without: Collection[int] = ()) -> None:
        """Raises RankLost when a trainer that `session` waits for is gone.

        without: ranks that have left and are not waited for.
        """
        session.check()
        group = session.group
        if group is None:
            return
        for rank, gone in sorted(group.left.items()):
            if rank not in without:
                raise RankLost(f"rank {rank} of job {self._job!r} is lost: {gone.ended}")


def check_incarnation(incarnation: str) -> None:
    """Raises InvalidRequest."""
    if not incarnation or len(incarnation) > _MAX_ID_CHARS:
        raise InvalidRequest(f"incarnation has to have 1 to {_MAX_ID_CHARS} characters")


def disagreement(rank: int, world_size: int, own_rank: int, own_world_size: int) -> Conflict:
    return Conflict(
        f"trainers disagree on world size: rank {rank} says {world_size}, "
        f"this trainer (rank {own_rank}) says {own_world_size}"
    )
