"""Tells the servers in which order this trainer uses parameters, so that they can read ahead."""

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from protos import zero_ps_pb2 as pb
from trainer.parameter import OffloadedParameter

if TYPE_CHECKING:
    from trainer.job import Job

_PULL, _GRADIENT = pb.PlannedUse.KIND_PULL, pb.PlannedUse.KIND_GRADIENT

_SECONDS = 30.0

_log = logging.getLogger(__name__)

_Use = tuple[pb.PlannedUse.Kind, int]


class PlanSender:
    """Writes down one iteration after the other and sends it when it is not as the last one was.

    In the order of use, which does not change with the speed of things, as that of requests does.
    """

    def __init__(self, job: "Job") -> None:
        self._job = job
        self._uses: list[_Use] = []
        self._asked: set[OffloadedParameter] = set()
        self._sent: list[_Use] = []
        self._calls: list[Any] = []

    def forget(self) -> None:
        """Servers have no plan of this trainer's any more."""
        self._uses.clear()
        self._asked.clear()
        self._sent, self._calls = [], []

    def asked(self, states: Iterable[OffloadedParameter]) -> None:
        """Parameters were asked of the servers."""
        self._asked.update(states)

    def used(self, state: OffloadedParameter) -> None:
        if state in self._asked or state.version != self._job.step:
            self._asked.discard(state)
            assert state.remote is not None
            self._uses.append((_PULL, state.remote.index))

    def gradient_came(self, state: OffloadedParameter) -> None:
        assert state.remote is not None
        self._uses.append((_GRADIENT, state.remote.index))

    def iteration_ended(self) -> None:
        """Sends the iteration if it is not as the last one that was sent; does not wait."""
        uses, self._uses = self._uses, []
        self._asked.clear()
        if not uses or uses == self._sent or any(not call.done() for call in self._calls):
            return
        self._sent = uses
        planned = [pb.PlannedUse(kind=kind, parameter=index) for kind, index in uses]
        self._calls = [
            server.start("Plan", pb.PlanRequest(session_id=server.session_id, uses=planned), _SECONDS)
            for server in self._job.servers
        ]
        for call in self._calls:
            call.add_done_callback(_report)


def _report(call: Any) -> None:
    """A server without a plan serves all the same, so that is no reason to stop."""
    if not call.cancelled() and call.exception() is not None:
        _log.debug("a server did not take the plan: %s", call.exception())
