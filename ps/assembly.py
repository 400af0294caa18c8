"""Who of a job's trainers will be in its next group. Shard 0 decides; the others hear of it from the trainers."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from ps.errors import Conflict, InvalidRequest, SessionEnded
from ps.monitor import Monitor, Patience
from ps.sessions import Session, Sessions, check_incarnation, disagreement


@dataclass(eq=False)
class Applicant:
    """A trainer that is ready to be in a group; the fields are those of `JoinGroupRequest`.

    session: its session in the group, once that is formed. refused: why it cannot be in one.
    """

    incarnation: str
    rank: int
    world_size: int
    elastic: bool = False
    again: bool = False
    known_group: int = 0
    former_group: int = 0
    keep_session: bool = False
    came_at: float = field(default_factory=time.monotonic)
    session: Session | None = None
    refused: str | None = None

    def check(self) -> None:
        """Raises InvalidRequest."""
        check_incarnation(self.incarnation)
        if not 0 <= self.former_group <= self.known_group:
            raise InvalidRequest(f"{self.known_group} and {self.former_group} are no numbers of groups")

    @property
    def place(self) -> tuple[bool, int, float]:
        """By which an elastic group is ordered: who had a rank keeps its place, newcomers are last."""
        return not self.again, self.rank, self.came_at


class Assembly:
    """Those who are ready for a job's next group.

    A group of fixed size is formed when all ranks have come. An elastic one is formed when those who began the job are
    there, and from then on whenever everybody has come who was in the group before and is still alive.

    newest_step: the last step that a trainer has asked for, or that was made; -1 before the first.
    parted: ranks that left after they asked for a step which the others have still to ask for.
    """

    def __init__(
        self,
        job: str,
        sessions: Sessions,
        monitor: Monitor,
        newest_step: Callable[[], int],
        parted: Callable[[], Collection[int]],
    ) -> None:
        self._job = job
        self._sessions = sessions
        self._monitor = monitor
        self._newest_step = newest_step
        self._parted = parted
        self._waiting: dict[str, Applicant] = {}
        # (The group that it is for, the step.)
        self._regroup: tuple[int, int] = (0, 0)

    @property
    def regroup_at(self) -> int:
        """The step after which the trainers of the present group have to join anew; 0 while nobody asks for that."""
        group, step = self._regroup
        return step if group == self._sessions.number else 0

    def join(self, applicant: Applicant, patience: Patience) -> Session:
        """Waits until the applicant's group is formed; its session in it.

        Raises Conflict for a trainer whose rank another one has, or that does not fit to the others; Timeout, naming
        whom it waited for.
        """
        applicant.check()
        self._sessions.check_rank(applicant.rank, applicant.world_size)
        with self._monitor:
            # The group's will be one more.
            self._sessions.check_number(applicant.known_group + 1)
            self._sessions.expire()
            self._check_alike(applicant)
            if not applicant.elastic:
                # First: a former run's leases may have to end, and nothing is to be disturbed by who does not fit.
                self._sessions.wait_for_world(applicant.rank, applicant.world_size, patience)
                self._let_others_leave(applicant, patience)
            self._admit(applicant)
            self._waiting[applicant.incarnation] = applicant
            try:
                self._monitor.wait_until(
                    lambda: self._formed(applicant), patience, self._missing, lambda: self._check(applicant)
                )
            finally:
                if self._waiting.get(applicant.incarnation) is applicant:
                    del self._waiting[applicant.incarnation]
                    self._monitor.changed()
        assert applicant.session is not None
        return applicant.session

    # ------------------------------------------------------------ admission

    def _check_alike(self, applicant: Applicant) -> None:
        group = self._sessions.group
        kinds = {other.elastic for other in self._waiting.values()}
        if group is not None and self._sessions.expected():
            kinds.add(group.elastic)
        if kinds - {applicant.elastic}:
            own, theirs = ("with", "without") if applicant.elastic else ("without", "with")
            raise Conflict(
                f"this trainer connects to job {self._job!r} {own} elastic=True and others are there {theirs} it; give "
                "all the same"
            )

    def _admit(self, applicant: Applicant) -> None:
        """Makes way for an applicant among those who are there; expects the monitor to be held."""
        sessions = self._sessions
        own = next((s for s in sessions.by_rank().values() if s.incarnation == applicant.incarnation), None)
        if own is not None:
            if not applicant.keep_session:
                sessions.give_up(own, "it has begun to recover")
        elif applicant.elastic:
            if sessions.by_rank() and not self.regroup_at:
                # Nobody has asked for the step after the newest, so all will hear of this when they do.
                self._regroup = sessions.number, self._newest_step() + 2
        else:
            self._take_rank(applicant)

    def _let_others_leave(self, applicant: Applicant, patience: Patience) -> None:
        """Where the last trainer of this rank left in order, the others make the step that it has asked for before it
        left, and may be about to leave as well: they have a lease's time for that."""
        sessions, rank = self._sessions, applicant.rank
        arrived = time.monotonic()

        def over() -> bool:
            if rank in sessions.by_rank() or not sessions.by_rank():
                return True
            return rank not in self._parted() and time.monotonic() - arrived > sessions.lease_seconds

        self._monitor.wait_until(
            over,
            patience,
            lambda: (
                f"ranks {sorted(sessions.by_rank())[:8]} of job {self._job!r} to make the step that rank {rank} asked "
                "for before it left, or to leave"
            ),
        )

    def _take_rank(self, applicant: Applicant) -> None:
        """A trainer comes for a rank that may be another one's. One that came before yields it to a newer one."""
        sessions, rank = self._sessions, applicant.rank
        holder = sessions.by_rank().get(rank)
        if holder is not None and applicant.again:
            raise self._superseded(rank)
        for other in self._waiting.values():
            if other.incarnation == applicant.incarnation or other.refused is not None:
                continue
            if other.world_size != applicant.world_size:
                other.refused = str(disagreement(rank, applicant.world_size, other.rank, other.world_size))
                self._monitor.changed()
                raise disagreement(other.rank, other.world_size, rank, applicant.world_size)
            if other.rank == rank:
                if applicant.again and (not other.again or other.former_group > applicant.former_group):
                    raise self._superseded(rank)
                other.refused = str(self._superseded(rank))
        if holder is not None:
            # Fences it, and with it the group.
            sessions.give_up(holder, f"a newer trainer took over rank {rank}")
        elif sessions.by_rank():
            sessions.end_group(f"a new trainer came for rank {rank}, whose trainer had left")

    def _superseded(self, rank: int) -> Conflict:
        return Conflict(
            f"another trainer process has taken rank {rank} of job {self._job!r} since this one was last heard of; "
            "end this one"
        )

    def _check(self, applicant: Applicant) -> None:
        if applicant.refused is not None:
            raise Conflict(applicant.refused)
        if self._waiting.get(applicant.incarnation) is not applicant:
            raise SessionEnded("the same trainer has asked to join once more")

    # ------------------------------------------------------------ formation

    def _formed(self, applicant: Applicant) -> bool:
        if applicant.session is None and applicant.refused is None and self._is_complete(applicant):
            self._form(applicant.elastic)
        return applicant.session is not None

    def _is_complete(self, applicant: Applicant) -> bool:
        if not applicant.elastic:
            return self._missing_ranks(applicant.world_size) == []
        if self._expected():
            return False
        if self._sessions.expected():
            return True
        again = [other for other in self._waiting.values() if other.again]
        if not again:
            return len(self._waiting) >= max(other.world_size for other in self._waiting.values())
        # This server does not know the group that they come from: it was started since. Who is to come at all has
        # noticed within a lease.
        waited = time.monotonic() - min(other.came_at for other in again)
        return len(again) >= max(o.world_size for o in again) or waited > self._sessions.lease_seconds

    def _expected(self) -> list[Session]:
        """Members of the group before that live and have not come yet."""
        return [session for session in self._sessions.expected() if session.incarnation not in self._waiting]

    def _missing_ranks(self, world_size: int) -> list[int]:
        ranks = {other.rank for other in self._waiting.values() if other.refused is None}
        return [rank for rank in range(world_size) if rank not in ranks]

    def _form(self, elastic: bool) -> None:
        by_rank = sorted(self._waiting.values(), key=lambda applicant: applicant.place)
        if not elastic:
            by_rank = sorted((a for a in by_rank if a.refused is None), key=lambda applicant: applicant.rank)
        number = max(self._sessions.number, *(applicant.known_group for applicant in by_rank)) + 1
        sessions = self._sessions.begin(number, [applicant.incarnation for applicant in by_rank], elastic)
        for applicant, session in zip(by_rank, sessions, strict=True):
            applicant.session = session
            del self._waiting[applicant.incarnation]
        self._monitor.changed()

    def _missing(self) -> str:
        applicant = next(iter(self._waiting.values()))
        if not applicant.elastic:
            ranks = self._missing_ranks(applicant.world_size)
            return f"ranks {ranks[:8]} of job {self._job!r} to join: they are not there yet, or were lost"
        if expected := self._expected():
            ranks = sorted(session.rank for session in expected)
            return (
                f"the present trainers of job {self._job!r} (ranks {ranks[:8]}) to come to a step boundary; they do "
                "where their loop uses job.recovering()"
            )
        return (
            f"{applicant.world_size} trainers, with which elastic job {self._job!r} begins, to join; there are "
            f"{len(self._waiting)}"
        )
