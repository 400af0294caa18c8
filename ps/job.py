"""One job on one server: its sessions, its shard, its steps. `opening` and `commits` are the rest of what it does."""

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

import torch

from ps.assembly import Applicant, Assembly
from ps.barrier import Barriers
from ps.chunk import Chunk
from ps.errors import Conflict, JobFailed, Leaving, SessionEnded, Timeout
from ps.generations import Generations
from ps.gradient_norms import GradientNorms
from ps.links import Chosen
from ps.monitor import Monitor, Patience
from ps.options import ServerOptions
from ps.plan import Plan
from ps.running_commits import RunningCommits
from ps.schedule import Kind
from ps.sessions import Session, Sessions
from ps.shard import FLUSH_SECONDS, Shard, at_liberty
from ps.staging import Staging
from ps.step_wish import StepWish
from ps.steps import Steps
from ps.store import JobStore
from ps.tier import Area, Incoming, Part, Tier
from ps.updater import Updater

_log = logging.getLogger(__name__)


class Job:
    """One job. Its methods block; `Patience` says for how long."""

    def __init__(
        self, name: str, options: ServerOptions, store: JobStore, tier: Tier, held_chunks: Callable[[], int] = lambda: 0
    ) -> None:
        self.name = name
        self.options = options
        self.generations = Generations(name, options, store)
        self.working = store.working
        self.tier = tier
        # Of all jobs of the server.
        self.held_chunks = held_chunks
        self.monitor = Monitor()
        # Held by who writes generations, or reads one.
        self._disk_lock = threading.Lock()
        # Held by whoever reads or changes weights and optimizer state as a whole: updates, the beginnings of
        # commits, restores and writes of weights. Pulls do without; they lock one chunk.
        # Nobody waits for memory while holding the monitor; see `ps.tier.tier`.
        self.shard_lock = threading.RLock()
        self.shard: Shard | None = None
        self.sessions = Sessions(
            name, options.lease_seconds, options.max_sessions, self.monitor, self._begin, self._leave
        )
        self.barriers = Barriers(self.sessions, self.monitor)
        self.commits = RunningCommits(name, self.monitor)
        self.updater = Updater(name, self.shard_lock, self.monitor, self.commits, late=options.late_updates)
        self.steps = Steps(name, self.sessions, self.monitor, self.updater)
        self.norms = GradientNorms(name, self.steps, self.monitor)
        self.assembly = Assembly(name, self.sessions, self.monitor, self._newest_step, lambda: self.steps.parted)
        self._staging: dict[str, Staging] = {}
        self.leaving = False

    # ------------------------------------------------------------ sessions

    def join_group(self, applicant: Applicant, patience: Patience) -> Session:
        """Waits for a group of trainers to be formed; see `Assembly.join`."""
        with self.monitor:
            return self.assembly.join(applicant, patience)

    def expects(self, rank: int, incarnation: str) -> bool:
        """Whether this trainer's session was begun with its group and is still to be opened."""
        with self.monitor:
            session = self.sessions.by_rank().get(rank)
            return session is not None and session.incarnation == incarnation and not session.claimed

    def open_session(
        self, rank: int, world_size: int, incarnation: str, read_only: bool, patience: Patience, group: int = 0
    ) -> Session:
        """A new session, or the one that was begun with the group; see `Sessions.open`. Returns once updates that were
        running are done.

        group: as shard 0 has numbered it; for a reader nothing, as are rank and world_size.
        """
        with self.monitor:
            if read_only:
                session = self.sessions.open_reader(incarnation)
            else:
                session = self.sessions.open(rank, world_size, incarnation, group)
        _log.info("job %r: session of %s opened", self.name, session.who)
        shard = self.shard
        if shard is not None:
            self.wait_at_rest(shard, session, patience)
            with self.monitor:
                # What the former trainer left may have turned out to be of no use only now.
                if len(self.sessions.living()) == 1 and self.shard is shard:
                    self._drop_useless_state()
        return session

    def _begin(self, session: Session) -> None:
        self.steps.join(session)
        self._staging[session.id] = Staging(self.tier, self.new_areas("staging"))
        if len(self.sessions.living()) == 1:
            self._drop_useless_state()

    def _newest_step(self) -> int:
        """The last step that was made, or that a trainer has asked for; -1 before the first."""
        made = -1 if self.shard is None else self.shard.step - 1
        return max(made, self.steps.newest_asked())

    def use_link(self, session: Session, chosen: Chosen) -> None:
        """Has a link carry the bytes of a session that was just opened; it is closed with the session."""
        with self.monitor:
            session.chosen = chosen
            if session.ended is not None:
                chosen.link.close()

    def close_session(self, session: Session, step: int = 0) -> None:
        """Its trainer leaves in order, having asked every server for the steps before `step`."""
        with self.monitor:
            if self.shard is not None:
                self.steps.keep(session, self.shard, step)
            self.sessions.close(session)

    def end_group(self, session: Session, reason: str, *, passed_on: bool = False) -> None:
        """The session's trainer will join anew, and so has everybody of its group to.

        passed_on: as another trainer is lost; reason is what another server said of that.
        """
        with self.monitor:
            if passed_on:
                self.sessions.lose(session, reason)
            else:
                self.sessions.give_up(session, reason)

    def living_sessions(self) -> list[Session]:
        with self.monitor:
            return self.sessions.living()

    def _leave(self, session: Session) -> None:
        _log.info("job %r: session of %s ended: %s", self.name, session.who, session.ended)
        self.steps.leave(session)
        self.barriers.leave(session)
        if (staging := self._staging.pop(session.id, None)) is not None:
            staging.close()
        for give_back in list(session.on_end):
            give_back()
        session.chosen.link.close()
        if self.shard is not None:
            self.shard.schedule.forget(session.id)

    def _drop_useless_state(self) -> None:
        """A shard that failed, or that never got all its weights, is of use only to those who know of it."""
        if self.shard is not None and (self.shard.failure is not None or self.shard.missing_weights()):
            self.drop_shard()

    def drop_shard(self) -> None:
        """Takes the state out of memory; expects the monitor to be held."""
        shard, self.shard = self.shard, None
        if shard is not None:
            shard.close()

    def expire(self, deaf_seconds: float) -> None:
        """Ends sessions whose lease ran out; see `Sessions.expire`."""
        with self.monitor:
            self.sessions.expire(deaf_seconds)

    def retire(self) -> bool:
        """Whether nobody needs this object any more: there is no session and no usable state.

        The memory of a state that is of no use is given back then.
        """
        with ExitStack() as locks:
            for lock in (self._disk_lock, self.shard_lock):
                if not lock.acquire(blocking=False):
                    # A trainer that is gone by now began to load or to write, and that is still going on.
                    return False
                locks.callback(lock.release)
            with self.monitor:
                if self.sessions.living() or self.usable_step >= 0:
                    return False
                self.drop_shard()
                return True

    @contextmanager
    def disk(self, patience: Patience) -> Iterator[None]:
        """One at a time writes generations, or reads one into memory. Raises Timeout."""
        if not self._disk_lock.acquire(timeout=max(0.0, patience.end - time.monotonic())):
            raise Timeout(f"waited {patience.seconds:g} s for a commit or a restore of job {self.name!r} to end")
        try:
            yield
        finally:
            self._disk_lock.release()

    def close(self) -> None:
        self.updater.close()

    @property
    def regroup_at(self) -> int:
        """See `Assembly.regroup_at`."""
        with self.monitor:
            return self.assembly.regroup_at

    @property
    def usable_step(self) -> int:
        """The step from which training can go on without a restore, or -1."""
        shard = self.shard
        return -1 if shard is None or shard.failure is not None or shard.missing_weights() else shard.step

    @property
    def resident_bytes(self) -> int:
        shard = self.shard
        staged = sum(staging.resident_bytes for staging in list(self._staging.values()))
        return (shard.resident_bytes if shard else 0) + self.steps.resident_bytes + staged

    def new_areas(self, what: str) -> tuple[Area, ...]:
        """Where something of this job is spilled to, on each disk; none where memory is not limited."""
        if not self.tier.limited:
            return ()
        name = f"{what}-{uuid.uuid4().hex[:8]}"
        return tuple(Area(working / name) for working in self.working)

    def staging(self, session: Session) -> Staging:
        session.check()
        try:
            return self._staging[session.id]
        except KeyError:
            raise SessionEnded("this session has just ended") from None

    def open_shard(self) -> Shard:
        """The shard. Raises Conflict while the job has no state, JobFailed after a failed step."""
        shard = self.shard
        if shard is None:
            raise Conflict(f"job {self.name!r} has no state on this server yet; open or restore it first")
        if shard.failure is not None:
            raise JobFailed(f"{shard.failure}; restore a committed step to go on")
        return shard

    # ------------------------------------------------------------ weights and steps

    def write_weights(
        self, session: Session, shard: Shard, step: int, values: Sequence[tuple[Chunk, Incoming]]
    ) -> None:
        """Replaces weights of chunks that are at `step`. Raises Conflict if one is not."""
        self.commits.wait_before_change(step, Patience.of(FLUSH_SECONDS))
        with at_liberty(shard, [chunk for chunk, _ in values], self.shard_lock):
            with self.monitor:
                self.check_at(session, shard, step, [chunk for chunk, _ in values], "a weight")
            for chunk, weight in values:
                self._write_weight(session, shard, chunk, weight)
            self.monitor.changed()

    def _write_weight(self, session: Session, shard: Shard, chunk: Chunk, weight: Incoming) -> None:
        if not chunk.has_weight and weight.tensor.dtype == chunk.dtype:
            with self.monitor, chunk.lock:
                session.check()
                shard.generation, shard.assigned = None, True
                chunk.take_over(weight)
            return
        with self.tier.lease([chunk.weight]), self.monitor, chunk.lock:
            session.check()
            # Buffers are written before every commit, mostly as they were. That is no change, and a
            # generation of this step stays good.
            if not chunk.holds(weight.tensor):
                shard.generation, shard.assigned = None, True
                chunk.write(weight.tensor)
        self.tier.give_back(weight)

    def check_at(self, session: Session, shard: Shard, step: int, chunks: Iterable[Chunk], what: str) -> None:
        """Raises unless the session may replace something (`what`) of these chunks at version `step`; expects the
        monitor to be held."""
        session.check()
        if self.shard is not shard:
            raise Conflict(f"job {self.name!r} was restored meanwhile")
        for chunk in chunks:
            if chunk.version != step:
                raise Conflict(f"{what} for version {step} of {chunk.label} came at version {chunk.version}")

    def step_from(self, session: Session, step: int, wish: StepWish, patience: Patience) -> None:
        """The session's word for a step; see `Steps.step`."""
        shard = self.open_shard()
        self.steps.catch_up(session, shard, step, patience)
        self._check_staying(step)
        self.steps.step(session, shard, step, wish)
        # Whatever was staged and fitted nowhere has been read back before training began.
        self.staging(session).clear()

    def announce_step(
        self,
        session: Session,
        step: int,
        wish: StepWish,
        patience: Patience,
        done: Iterable[Chunk] = (),
        *,
        zero_grad: bool = False,
    ) -> None:
        """What the session will ask for with `step_from`; see `Steps.announce`."""
        shard = self.open_shard()
        self.steps.catch_up(session, shard, step, patience)
        self._check_staying(step)
        self.steps.announce(session, shard, step, wish, done, zero_grad=zero_grad)

    def leave(self) -> None:
        """The server is about to stop: no step begins any more. One that a rank has asked for may still come about."""
        with self.monitor:
            self.leaving = True
            self.monitor.changed()

    def _check_staying(self, step: int) -> None:
        with self.monitor:
            if self.leaving and not self.steps.pending:
                raise Leaving(f"the server is stopping and begins no step {step} of job {self.name!r} any more")

    def wait_for_boundary(self, shard: Shard, patience: Patience) -> None:
        """Waits until no step is under way, or until those that would complete one do not come."""
        self.updater.need(shard, shard.newest_version)
        with suppress(Timeout):
            self.monitor.wait_until(
                lambda: (shard.at_rest and not self.steps.pending) or shard.failure is not None,
                patience,
                lambda: "a step",
            )

    def set_plan(self, session: Session, shard: Shard, plan: Plan) -> None:
        """Replaces what the session said before of the order in which it uses parameters."""
        plan.check(len(shard.manifest))
        with self.monitor:
            session.check()
        if session.rank == 0 and not session.read_only:
            shard.schedule.follow(plan, shard.chunks_of())
            self.tier.rank_again()

    def used(
        self, session: Session, shard: Shard, kind: Kind, chunk: Chunk, step: int, dtype: torch.dtype | None = None
    ) -> None:
        """A session pulls a chunk (in `dtype`) or sends its gradient. Where memory is limited, what it needs next
        is read ahead."""
        schedule = shard.schedule
        if session.read_only:
            return
        began = schedule.used(session.id, kind, chunk, step)
        if not self.tier.limited:
            return
        if began:
            self.tier.rank_again()
        self.tier.ahead(
            part
            for use, later in schedule.upcoming(session.id, self.tier.ahead_limit_bytes)
            for part in self._needed(session, shard, use, later, step, dtype)
        )

    def _needed(
        self, session: Session, shard: Shard, kind: Kind, chunk: Chunk, step: int, dtype: torch.dtype | None
    ) -> Iterator[Part]:
        """What of a chunk a use in the near future needs, as far as that is there already."""
        if kind == "gradient":
            if (part := self.steps.part(session, chunk, step)) is not None:
                yield part
            if shard.schedule.is_early(chunk) and chunk.version == step:
                # Its update follows at once.
                yield chunk.weight
                yield from chunk.state.values()
        elif chunk.version >= step:
            # What has still to be updated will be in memory then.
            yield chunk.pulled(dtype) or chunk.weight

    # ------------------------------------------------------------ waiting

    def wait_for_version(self, session: Session, shard: Shard, chunk: Chunk, version: int, patience: Patience) -> None:
        """Waits until a chunk is at `version` or beyond it."""
        self.updater.need(shard, version)
        self.wait_for_any_since(session, shard, chunk, version, patience)

    def wait_for_any_since(
        self, session: Session, shard: Shard, chunk: Chunk, version: int, patience: Patience, step: int | None = None
    ) -> None:
        """As `wait_for_version`, for a trainer that is at a later `step`; see `Terms.max_staleness`."""
        self.monitor.wait_until(
            lambda: chunk.version >= version and self.shard is shard,
            patience,
            lambda: (
                f"version {version} of {chunk.label} of job {self.name!r}, which is at {chunk.version}"
                + ("" if step is None else f" (max_staleness={step - version}, and the trainer is at step {step})")
            ),
            lambda: self.check_version(session, shard, version),
        )

    def wait_for_weight(self, session: Session, shard: Shard, chunk: Chunk, patience: Patience) -> None:
        """Waits until rank 0 has written a chunk's first weight."""
        self.monitor.wait_until(
            lambda: chunk.has_weight and self.shard is shard,
            patience,
            lambda: f"rank 0 to write {chunk.label} of job {self.name!r}, which has no weight yet",
            # As for a step that is still to come, it takes the other trainers to get there.
            lambda: self.check_version(session, shard, shard.step + 1),
        )

    def wait_at_rest(self, shard: Shard, session: Session, patience: Patience) -> None:
        """Waits until no update is running or about to, and no announced step has updated a part of the chunks."""
        self.updater.need(shard, shard.newest_version)
        self.monitor.wait_until(
            lambda: shard.at_rest or shard.failure is not None,
            patience,
            lambda: f"updates to step {shard.newest_version} of job {self.name!r}, which is at {shard.updated_step}",
            session.check,
        )

    def check_version(self, session: Session, shard: Shard, version: int) -> None:
        """Raises when there is no point in waiting for a version."""
        session.check()
        if self.shard is not shard:
            raise Conflict(f"job {self.name!r} was restored meanwhile")
        if shard.failure is not None:
            raise JobFailed(f"{shard.failure}; restore a committed step to go on")
        if version > shard.step:
            self._check_staying(shard.step)
            self.steps.check_progress(session)
