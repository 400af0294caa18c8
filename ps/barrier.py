"""Barrier: an all-gather of small payloads among the trainers of a job."""

from collections import OrderedDict
from dataclasses import dataclass, field

from ps.errors import InvalidRequest
from ps.monitor import Monitor, Patience
from ps.sessions import Session, Sessions

_MAX_TAG_CHARS = 200
_MAX_GATHERED_BYTES = 16 << 20
_KEPT = 64
_KEPT_BYTES = 32 << 20
"""Of gatherings that nobody waits for any more: whose call was cut off may ask again for what came of it."""


@dataclass(eq=False)
class _Gathering:
    """Payloads under one tag, by session, so that a trainer's successor does not inherit them."""

    payloads: dict[str, bytes] = field(default_factory=dict)
    result: list[bytes] | None = None
    waiting: int = 0

    @property
    def num_bytes(self) -> int:
        return sum(map(len, self.payloads.values()))


class Barriers:
    """Barriers of one job."""

    def __init__(self, sessions: Sessions, monitor: Monitor) -> None:
        self._sessions = sessions
        self._monitor = monitor
        self._gatherings: OrderedDict[str, _Gathering] = OrderedDict()

    def gather(self, session: Session, tag: str, payload: bytes, patience: Patience) -> list[bytes]:
        """Waits until every rank came with this tag; returns the payloads by rank.

        A repeated call of a session gets the same answer. Raises RankLost, Timeout, InvalidRequest.
        """
        if session.read_only:
            raise InvalidRequest("a read-only session has no rank and takes part in no barrier")
        if not tag or len(tag) > _MAX_TAG_CHARS:
            raise InvalidRequest(f"a barrier's tag has to have 1 to {_MAX_TAG_CHARS} characters")
        limit = _MAX_GATHERED_BYTES // session.world_size
        if len(payload) > limit:
            raise InvalidRequest(f"a barrier's payload may have {limit} bytes, not {len(payload)}")
        with self._monitor:
            gathering = self._gatherings.get(tag)
            if gathering is None or (gathering.result is not None and session.id not in gathering.payloads):
                gathering = self._gatherings[tag] = _Gathering()
            if gathering.result is None:
                gathering.payloads[session.id] = payload
                self._complete(gathering, session.world_size)
            self._gatherings.move_to_end(tag)
            gathering.waiting += 1
            self._forget()

            def missing() -> list[int]:
                trainers = self._sessions.by_rank()
                return [
                    rank
                    for rank in range(session.world_size)
                    if rank not in trainers or trainers[rank].id not in gathering.payloads
                ]

            try:
                self._monitor.wait_until(
                    lambda: gathering.result is not None,
                    patience,
                    lambda: f"ranks {missing()[:8]} of job {session.job!r} to come to barrier {tag!r}",
                    lambda: self._sessions.check_group(session),
                )
            finally:
                gathering.waiting -= 1
            assert gathering.result is not None
            return gathering.result

    def leave(self, session: Session) -> None:
        """Forgets what nobody but this session came to; expects the monitor to be held."""
        for tag, gathering in list(self._gatherings.items()):
            if gathering.result is None and gathering.payloads.keys() <= {session.id}:
                del self._gatherings[tag]

    def _forget(self) -> None:
        """The oldest first, if there are too many. What somebody waits for stays."""
        kept = {tag: gathering for tag, gathering in self._gatherings.items() if not gathering.waiting}
        size = sum(gathering.num_bytes for gathering in kept.values())
        for number, (tag, gathering) in enumerate(kept.items()):
            if len(kept) - number <= _KEPT and size <= _KEPT_BYTES:
                return
            size -= gathering.num_bytes
            del self._gatherings[tag]

    def _complete(self, gathering: _Gathering, world_size: int) -> None:
        trainers = self._sessions.trainers(world_size)
        if trainers is not None and all(t.id in gathering.payloads for t in trainers):
            gathering.result = [gathering.payloads[t.id] for t in trainers]
            self._monitor.changed()
