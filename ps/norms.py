"""Norms of averaged gradients that were computed, kept for the ranks that have still to ask for them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ps.gradient_edits import GradientEdit

MAX_KEPT = 1 << 20
"""How many numbers a job keeps, so that a trainer that asks for ever other norms cannot fill the server."""


@dataclass(frozen=True)
class NormKey:
    """What a norm is of. Every rank asks for the same ones.

    epoch: how often the ranks began the step anew; see `Contributions.epoch`.
    edits: what is done to the gradients first.
    """

    epoch: int
    parameters: tuple[int, ...]
    norm_type: float
    edits: tuple[GradientEdit, ...] = ()


@dataclass(eq=False)
class _Answer:
    norms: Sequence[float]
    told: set[str] = field(default_factory=set)


class Norms:
    """The answers of one step. Every method expects the job's monitor to be held."""

    def __init__(self) -> None:
        self._answers: dict[NormKey, _Answer] = {}
        self._kept = 0

    def __contains__(self, key: NormKey) -> bool:
        return key in self._answers

    def was_told(self, key: NormKey, session_id: str) -> bool:
        answer = self._answers.get(key)
        return answer is not None and session_id in answer.told

    def tell(self, key: NormKey, session_id: str) -> Sequence[float] | None:
        """The answer, if it was computed."""
        answer = self._answers.get(key)
        if answer is None:
            return None
        answer.told.add(session_id)
        return answer.norms

    def keep(self, key: NormKey, norms: Sequence[float]) -> None:
        """Keeps an answer until the step begins or all ranks have gone on to the next epoch.

        That there is an answer of an epoch means that every rank has reached it, so that none will ask for
        those of an earlier one.
        """
        for other in [other for other in self._answers if other.epoch < key.epoch]:
            self._drop(other)
        self._answers[key] = _Answer(norms)
        self._kept += len(norms) + 1
        while self._kept > MAX_KEPT and len(self._answers) > 1:
            self._drop(next(iter(self._answers)))

    def clear(self) -> None:
        self._answers.clear()
        self._kept = 0

    def _drop(self, key: NormKey) -> None:
        self._kept -= len(self._answers.pop(key).norms) + 1
