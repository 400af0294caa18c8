"""Steps of one job: contributions come in, become final, and a step begins once all trainers agree."""

from collections.abc import Collection, Iterable, Sequence

import torch

from ps.agreed_step import AgreedStep
from ps.chunk import Chunk
from ps.contributions import Contributions, Gradient, Terms
from ps.errors import Conflict, InvalidRequest, JobFailed, SessionEnded
from ps.gradient_edits import by_parameter, check_edits
from ps.monitor import Monitor, Patience
from ps.norms import Norms
from ps.optimizer import Options
from ps.sessions import Session, Sessions
from ps.shard import Shard
from ps.step_wish import StepWish, difference
from ps.tier import Part
from ps.updater import Updater


class Steps:
    """Contributions of the present sessions, and who has said what about the next step.

    norms: that were computed of them; see `ps.gradient_norms`.
    """

    def __init__(self, job: str, sessions: Sessions, monitor: Monitor, updater: Updater) -> None:
        self._job = job
        self._sessions = sessions
        self._monitor = monitor
        self._updater = updater
        self._contributions: dict[str, Contributions] = {}
        # Of ranks that left in order and asked for the next step before, which the others have still to ask for.
        self._parted: dict[int, Contributions] = {}
        # Of those who announced the next step or asked for it, and that step once all of them have.
        self._wishes: dict[int, StepWish] = {}
        self._agreed: AgreedStep | None = None
        self._disagreement: str | None = None
        self.norms = Norms()

    def join(self, session: Session) -> None:
        """A session begins; expects the monitor to be held."""
        self._contributions[session.id] = Contributions(f"gradient-{session.id[:8]}")
        if not session.read_only:
            # It knows nothing of what the others have been through, so all count from the same epoch.
            self._begin_epochs()

    def keep(self, session: Session, shard: Shard, step: int) -> None:
        """A trainer is about to leave in order, and has asked every server for the steps before `step`.

        If the last of them has still to be made, what it contributed stays for that. Elsewhere it might have said less:
        a step that only some servers can make would be half done. Expects the monitor to be held.
        """
        contributions = self._contributions.get(session.id)
        if contributions is not None and contributions.stepped == shard.step == step - 1:
            self._parted[session.rank] = self._contributions.pop(session.id)

    def leave(self, session: Session) -> None:
        """Discards what a session contributed and no step will use; expects the monitor to be held."""
        contributions = self._contributions.pop(session.id, None)
        if contributions is not None:
            contributions.drop()
        if session.read_only:
            return
        if contributions is not None:
            self._wishes.pop(session.rank, None)
            self._abandon(f"rank {session.rank} was lost: {session.ended}")
            self._disagreement = None
        if not session.left:
            self.norms.clear()
        if not session.left or not self._sessions.by_rank():
            self._forget_parted(f"rank {session.rank} was lost: {session.ended}")

    def _forget_parted(self, why: str) -> None:
        """The step that they asked for is not made by this group."""
        for rank in self._parted:
            self._wishes.pop(rank, None)
            self._abandon(why)
        self._drop_parted()

    def _drop_parted(self) -> None:
        for contributions in self._parted.values():
            contributions.drop()
        self._parted.clear()

    def reset(self) -> None:
        """Discards everything, for a restore; expects the monitor to be held."""
        for id, old in self._contributions.items():
            new = self._contributions[id] = Contributions(old.name)
            new.terms, new.stated = old.terms, old.stated
            old.drop()
        self._drop_parted()
        self._wishes.clear()
        self._abandon("a restore came")
        self._disagreement = None
        self.norms.clear()

    @property
    def pending(self) -> bool:
        """Whether a rank has asked for the next step or announced it. Expects the monitor to be held."""
        return bool(self._wishes)

    @property
    def resident_bytes(self) -> int:
        return sum(c.resident_bytes for c in [*self._contributions.values(), *self._parted.values()])

    @property
    def parted(self) -> Collection[int]:
        """Ranks that left in order and have done what the next step needs of them; expects the monitor to be held."""
        return self._parted.keys()

    def newest_asked(self) -> int:
        """The last step that a trainer of the present group has asked for, or -1; expects the monitor to be held."""
        return max((self._contributions[s.id].stepped for s in self._sessions.by_rank().values()), default=-1)

    def of(self, session: Session) -> Contributions:
        """Raises SessionEnded; InvalidRequest for a session that has no rank."""
        session.check()
        if session.read_only:
            raise InvalidRequest("a read-only session cannot change anything")
        try:
            return self._contributions[session.id]
        except KeyError:
            raise SessionEnded("this session has just ended") from None

    def by_rank(self, session: Session) -> list[Contributions] | None:
        """Those of all ranks of a session's world, or None while one is missing; expects the monitor to be held."""
        present = {rank: self._contributions[each.id] for rank, each in self._sessions.by_rank().items()}
        found = self._parted | present
        ranks = range(session.world_size)
        return [found[rank] for rank in ranks] if found.keys() >= set(ranks) else None

    def agree_on(self, session: Session, terms: Terms) -> None:
        """Notes a session's terms. Raises Conflict if another one has stated others."""
        mine = self.of(session)
        with self._monitor:
            session.check()
            for other in self._sessions.by_rank().values():
                theirs = self._contributions[other.id]
                if other is session or not theirs.stated or theirs.terms == terms:
                    continue
                what, *values = theirs.terms.difference(terms)
                raise Conflict(
                    f"trainers disagree on {what}: it is {values[0]} on rank {other.rank} and {values[1]} on rank "
                    f"{session.rank}"
                )
            mine.terms, mine.stated = terms, True

    def part(self, session: Session, chunk: Chunk, step: int) -> Part | None:
        """Where a session's gradients of a chunk for a step add up, if it has sent any."""
        contributions = self._contributions.get(session.id)
        return None if contributions is None else contributions.part(chunk, step)

    def check_progress(self, session: Session) -> None:
        """Raises when the next step cannot come about: a trainer is lost, or they disagree."""
        self._sessions.check_group(session, without=self._parted)
        if self._disagreement is not None and not session.read_only:
            raise Conflict(self._disagreement)

    def add(
        self,
        session: Session,
        contributions: Contributions,
        step: int,
        sequence: int,
        gradients: Sequence[Gradient],
        *,
        final: bool = False,
    ) -> list[torch.Tensor]:
        """Counts gradients (any floating dtype) of one micro-batch. Returns memory to use again.

        final: there are no more of these chunks in an announced step, which may now update them.
        Raises Conflict if the session has said that its contributions to the step are final, or if an
        earlier contribution is missing. What was counted before is not counted again.
        """
        with contributions.lock:
            session.check()
            if final:
                self._check_announced(session, contributions, step)
            new = [gradient for gradient in gradients if contributions.check_sequence(gradient.chunk, step, sequence)]
            if new and (
                contributions.final_step >= step or any(contributions.is_final(each.chunk, step) for each in new)
            ):
                raise Conflict(
                    f"rank {session.rank} said that its gradients of step {step} are final and then sent "
                    "another; call zero_grad first to begin anew"
                )
            spare = [contributions.add(gradient, step) for gradient in new]
            for gradient in gradients:
                gradient.chunk.tier.give_back(gradient.values)
            if final:
                self._finish(session, contributions, step, [each.chunk for each in new])
        return [tensor for tensor in spare if tensor is not None]

    def _finish(self, session: Session, contributions: Contributions, step: int, chunks: Sequence[Chunk]) -> None:
        """These chunks get no more gradients of a session; expects its contributions to be locked."""
        with self._monitor:
            session.check()
            for chunk in chunks:
                contributions.finish(chunk, step)
            if self._agreed is not None and self._agreed.look(chunks):
                self._updater.submit(self._agreed)

    def _check_announced(self, session: Session, contributions: Contributions, step: int) -> None:
        if contributions.stepped < step and session.rank not in self._wishes:
            raise Conflict(f"rank {session.rank} sent a final gradient of step {step}, which it has not announced")

    def zero(
        self, session: Session, shard: Shard, step: int, chunks: Iterable[Chunk], keep_zeros: bool = False
    ) -> None:
        """Discards the session's contributions to these chunks. Raises Conflict if it is not at `step`."""
        contributions = self.of(session)
        with contributions.lock:
            with self._monitor:
                session.check()
                stepped = contributions.stepped == shard.step
                present = shard.step + stepped
                if step != present:
                    raise Conflict(f"rank {session.rank} zeroes gradients of step {step} but is at step {present}")
                if not stepped:
                    self.check_not_announced(session, "zeroes gradients")
                    # Norms that were computed stay: other ranks may be about to ask for them.
                    if contributions.final_step == step:
                        contributions.epoch += 1
                    contributions.final_step = -1
                    self._monitor.changed()
            contributions.zero(chunks, present, keep_zeros)

    def catch_up(self, session: Session, shard: Shard, step: int, patience: Patience) -> None:
        """Waits for the other ranks where a trainer is one step ahead: it gave its word and pulled nothing since."""
        contributions = self.of(session)
        self._monitor.wait_until(
            lambda: shard.step >= step or contributions.stepped != step - 1,
            patience,
            lambda: f"the other ranks' step {step - 1} of job {self._job!r}",
            lambda: self.check_progress(session),
        )

    def announce(
        self,
        session: Session,
        shard: Shard,
        step: int,
        wish: StepWish,
        done: Iterable[Chunk] = (),
        *,
        zero_grad: bool = False,
    ) -> None:
        """The session will ask for the step with this wish, and says of gradients when they are final.

        done: chunks to which it contributes no more in this step. zero_grad: its gradients go as they are used.
        Once every rank has announced the step or asked for it, chunks that are final on every rank are updated.
        Repeating it is harmless. Raises Conflict if the ranks disagree about options.
        """
        contributions = self.of(session)
        options = self._resolve(session, shard, wish)
        with contributions.lock, self._monitor:
            self.check_step(session, shard, step)
            if contributions.stepped == step:
                raise Conflict(f"rank {session.rank} announces step {step}, which it has asked for already")
            self._agree(session, shard, step, wish, options)
            contributions.done = frozenset(done)
            contributions.zeroes = step if zero_grad else -1
            for chunk in contributions.done:
                contributions.finish(chunk, step)
            if self._agreed is not None and self._agreed.look():
                self._updater.submit(self._agreed)
            self._monitor.changed()

    def withdraw(self, session: Session, shard: Shard, step: int) -> None:
        """Takes an announcement back. Raises Conflict once the session has sent a final gradient."""
        contributions = self.of(session)
        with contributions.lock, self._monitor:
            self.check_step(session, shard, step)
            if contributions.stepped == step or not contributions.done.issuperset(contributions.final_chunks(step)):
                raise Conflict(
                    f"rank {session.rank} takes back its announcement of step {step} after it sent a final gradient"
                )
            contributions.reopen(step)
            contributions.zeroes = -1
            # Else it was refused, and the others have still to hear why.
            if self._wishes.pop(session.rank, None) is not None:
                self._abandon(f"rank {session.rank} took its announcement back")
                self._disagreement = None
            self._monitor.changed()

    def check_none_announced(self) -> None:
        """Raises Conflict while a step is announced; expects the monitor to be held."""
        if self._wishes:
            rank = min(self._wishes)
            raise Conflict(f"the optimizer of job {self._job!r} cannot change now: rank {rank} announced the next step")

    def step(self, session: Session, shard: Shard, step: int, wish: StepWish) -> None:
        """The session's contributions are final; with the last rank's word the step begins.

        Repeating it is harmless. Raises Conflict if the ranks disagree about options.
        """
        contributions = self.of(session)
        if contributions.stepped == step:
            return
        options = self._resolve(session, shard, wish)
        with contributions.lock:
            with self._monitor:
                if contributions.stepped == step:
                    return
                self.check_step(session, shard, step)
                self._agree(session, shard, step, wish, options)
                contributions.final_step = contributions.stepped = step
                if (agreed := self._agreed) is not None:
                    if all(each.stepped == step for each in agreed.contributions):
                        self._complete(agreed, wish)
                    elif agreed.look():
                        self._updater.submit(agreed)
                self._monitor.changed()
            if contributions.zeroes == step:
                contributions.zero(shard, step + 1)

    def _resolve(self, session: Session, shard: Shard, wish: StepWish) -> Options:
        """Checks a wish. Raises Conflict and InvalidRequest."""
        if shard.optimizer is None:
            raise Conflict(f"job {self._job!r} has no optimizer; state one before the first step")
        if self._wishes.get(session.rank) != wish:
            check_edits(wish.edits, len(shard.manifest))
        return shard.optimizer.resolve(wish.groups)

    def _agree(self, session: Session, shard: Shard, step: int, wish: StepWish, options: Options) -> None:
        """Notes a rank's wish; the step is agreed on with that of the last one."""
        shard.check_weights()
        mine = self._wishes.get(session.rank)
        if mine is not None and (differs := difference(mine, wish)):
            raise Conflict(
                f"rank {session.rank} announced step {step} with {differs[0]} {differs[1]} and now names "
                f"{differs[2]}; what was announced cannot change any more"
            )
        for rank, other in self._wishes.items():
            if differs := difference(other, wish):
                self._disagreement = (
                    f"trainers disagree on step {step}: {differs[0]} is {differs[1]} on rank {rank} and "
                    f"{differs[2]} on rank {session.rank}"
                )
                self._monitor.changed()
                raise Conflict(self._disagreement)
        self._disagreement = None
        self._wishes[session.rank] = wish
        if self._agreed is None and self._wishes.keys() >= set(range(session.world_size)):
            by_rank = self.by_rank(session)
            if by_rank is not None:
                self._agreed = AgreedStep(shard, step, options, by_rank)

    def _complete(self, agreed: AgreedStep, wish: StepWish) -> None:
        agreed.edits, agreed.complete = by_parameter(wish.edits), True
        agreed.shard.step += 1
        agreed.shard.newest_version = agreed.shard.step
        self._agreed = None
        self._wishes.clear()
        self._drop_parted()
        self._begin_epochs()
        self._updater.submit(agreed)

    def _abandon(self, why: str) -> None:
        """The step that was announced does not come about. Expects the monitor to be held."""
        if (agreed := self._agreed) is not None:
            self._agreed = None
            agreed.lost = why
            self._updater.submit(agreed)

    def check_not_announced(self, session: Session, does: str) -> None:
        """Raises Conflict if the session has announced the next step; expects the monitor to be held."""
        if session.rank in self._wishes:
            raise Conflict(
                f"rank {session.rank} {does} after it announced the step of job {self._job!r}: some chunks may have "
                "gone on already; ask for the step first"
            )

    def _begin_epochs(self) -> None:
        for contributions in self._contributions.values():
            contributions.epoch = 0
        self.norms.clear()

    def check_step(self, session: Session, shard: Shard, step: int) -> None:
        """Raises unless this is the job's next step; expects the monitor to be held."""
        session.check()
        if shard.failure is not None:
            raise JobFailed(f"{shard.failure}; restore a committed step to go on")
        if step != shard.step:
            raise Conflict(
                f"rank {session.rank} is at step {step}, job {self._job!r} on shard {shard.index} at {shard.step}"
            )
