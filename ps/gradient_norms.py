"""Norms of averaged gradients: ranks ask for the same ones, and what the first one computes all are told."""

import math
import threading
from collections.abc import Callable, Sequence

import torch

from ps.chunk import Chunk
from ps.contributions import Contributions, average, gradient_parts, new_average
from ps.errors import Conflict, InvalidRequest
from ps.gradient_edits import GradientEdit, by_parameter, check_edits
from ps.monitor import Monitor, Patience
from ps.norms import NormKey
from ps.sessions import Session
from ps.shard import Shard
from ps.steps import Steps
from ps.tier import ReadAhead


class GradientNorms:
    """The norms of one job's next step."""

    def __init__(self, job: str, steps: Steps, monitor: Monitor) -> None:
        self._job = job
        self._steps = steps
        self._monitor = monitor
        # Held by who computes.
        self._lock = threading.Lock()

    def of(
        self,
        session: Session,
        shard: Shard,
        step: int,
        parameters: Sequence[int],
        norm_type: float,
        edits: Sequence[GradientEdit],
        patience: Patience,
    ) -> Sequence[float]:
        """The norm of the averaged and edited gradient of each chunk here, in the order of the manifest.

        Makes the session's contributions final and waits for those of the other ranks, of the same epoch. A
        chunk that nobody contributed to has norm 0. Raises Conflict when this rank and another one cannot
        be meaning the same gradients.
        """
        if math.isnan(norm_type):
            raise InvalidRequest("norm_type is not a number")
        check_edits(edits, len(shard.manifest))
        chunks = shard.select(parameters)
        self._steps.catch_up(session, shard, step, patience)
        contributions = self._steps.of(session)

        def key() -> NormKey:
            return NormKey(contributions.epoch, tuple(parameters), norm_type, tuple(edits))

        def everyone() -> list[Contributions] | None:
            return self._steps.by_rank(session)

        def all_final() -> bool:
            by_rank = everyone()
            return by_rank is not None and all(c.final_step == step and c.epoch == contributions.epoch for c in by_rank)

        def check() -> None:
            self._steps.check_progress(session)
            self._steps.check_step(session, shard, step)
            if self._steps.of(session) is not contributions or contributions.final_step != step:
                raise Conflict(f"rank {session.rank} discarded its gradients while it waited for their norm")
            for rank, other in enumerate(everyone() or ()):
                if other.epoch > contributions.epoch:
                    raise Conflict(
                        f"rank {rank} discarded its gradients of step {step} before rank {session.rank} asked "
                        "for their norm; every rank has to ask for the same norms and then call zero_grad"
                    )
                if other.epoch < contributions.epoch and rank in self._steps.parted:
                    raise Conflict(
                        f"rank {rank} asked for step {step} and left, while rank {session.rank} discarded its "
                        "gradients of that step and began anew; every rank has to do the same"
                    )

        with contributions.lock, self._monitor:
            self._steps.check_step(session, shard, step)
            if contributions.stepped != step:
                self._steps.check_not_announced(session, "asks for norms")
            contributions.final_step = step
            if self._steps.norms.was_told(key(), session.id):
                # It asks again and another rank began anew meanwhile: this one had nothing to discard, so
                # what it has contributed is its part in the new epoch, too.
                contributions.epoch = max(c.epoch for c in everyone() or (contributions,))
            self._monitor.changed()
        self._monitor.wait_until(
            lambda: key() in self._steps.norms or all_final(),
            patience,
            lambda: f"the other ranks' gradients of step {step} of job {self._job!r}",
            check,
        )
        # Every rank asks for the same; the first one computes it. Until then none has its answer, so none
        # discards what this reads.
        with self._lock:
            with self._monitor:
                asked, by_rank = key(), everyone()
                norms = self._steps.norms.tell(asked, session.id)
                if norms is not None:
                    return norms
                if by_rank is None or not all_final():
                    raise self._gone(session, check)
            norms = _compute(shard, step, chunks, by_rank, norm_type, edits, patience)
            with self._monitor:
                if everyone() != by_rank or key() != asked or not all_final():
                    raise self._gone(session, check)
                self._steps.norms.keep(asked, norms)
                self._steps.norms.tell(asked, session.id)
            return norms

    def _gone(self, session: Session, check: Callable[[], None]) -> Conflict:
        """Why gradients that were final are no longer; `check` may know better and raises then."""
        check()
        return Conflict(
            f"gradients of job {self._job!r} were discarded while rank {session.rank} computed their norm: a trainer "
            "was replaced, or gave up waiting"
        )


def _compute(
    shard: Shard,
    step: int,
    chunks: Sequence[Chunk],
    by_rank: Sequence[Contributions],
    norm_type: float,
    edits: Sequence[GradientEdit],
    patience: Patience,
) -> list[float]:
    norms = []
    edits_of = by_parameter(edits)
    ahead = ReadAhead(shard.tier, chunks, lambda chunk: gradient_parts(chunk, by_rank, step))
    for number, chunk in enumerate(chunks):
        shard.schedule.norm(step, chunk)
        ahead.reached(number)
        norms.append(_norm(chunk, by_rank, step, norm_type, edits_of.get(chunk.parameter, ()), patience))
    shard.schedule.norm(step, None)
    return norms


def _norm(
    chunk: Chunk,
    contributions: Sequence[Contributions],
    step: int,
    norm_type: float,
    edits: Sequence[GradientEdit],
    patience: Patience,
) -> float:
    parts = gradient_parts(chunk, contributions, step)
    into = new_average(chunk, contributions, step)
    fresh = () if into is None else (into,)
    scratch = chunk.num_bytes() if edits and into is None else 0
    what = f"the norm of the gradient of {chunk.label}"
    with chunk.tier.lease(parts, fresh, scratch_bytes=scratch, what=what, patience=patience), chunk.lock:
        gradient = average(chunk, contributions, step, into)
        if gradient is None:
            return 0.0
        if edits and into is None:
            # It is what the trainer sent, which the update edits once more.
            gradient = gradient.clone()
        for edit in edits:
            edit.apply(gradient)
        return float(torch.linalg.vector_norm(gradient, norm_type))
