"""Decides what to request from the servers and what to let go.

Each use of a parameter is a step along the trace (`forecast`). After it the coordinator asks for what
comes next, as far ahead as is of use (`pace`) and as there is room for (`residency`), in the order in which
it is needed (`requests`). What was used stays while its next use is near and nothing nearer needs the room.

The parts have counterparts in DeepSpeed's `PartitionedParameterCoordinator`: `fetch_sub_module`,
`release_sub_module`, and the knobs of the same names.
"""

import contextlib
import math
import time
from collections import deque
from collections.abc import Container, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from trainer.announcement import Announcement
from trainer.config import OffloadConfig
from trainer.forecast import Forecast, module_order, signature
from trainer.group import TrainerGroup
from trainer.memory import MemoryPool
from trainer.pace import Pace
from trainer.parameter import NOT_HERE, OffloadedParameter
from trainer.plan import PlanSender
from trainer.requests import Request, Requests, small_ones_together
from trainer.residency import Residency, cost
from trainer.statistics import Statistics

if TYPE_CHECKING:
    from trainer.job import Job
    from trainer.timeline import Timeline


class Coordinator:
    """Gathers and releases the parameters of one model.

    One thread at a time runs a model forward or backward, and calls this; only `unsaved` may come from
    any thread.

    group: the trainers that pull together, if they do. Then all of them have to ask for the same in the same
        order, so nothing here may depend on how fast anything is, nor on what one of them has for itself.
    """

    def __init__(
        self,
        job: "Job",
        config: OffloadConfig,
        memory: MemoryPool,
        announcement: Announcement,
        group: TrainerGroup | None = None,
    ) -> None:
        self.statistics = Statistics()
        self.pace = Pace()
        self.forecast = Forecast(self.pace)
        self.residency = Residency(config, memory, self.forecast)
        # Values were assigned to released parameters; every rank has to be past that before any pulls.
        self.assigned = False
        self._job = job
        self._config = config
        self._announcement = announcement
        self._group = group
        self._requests = Requests(job, self.pace, group)
        self._plan = PlanSender(job)
        # Everything before this place of the forecast is whole or asked for.
        self._frontier = 0
        # When the last use was served, on the performance counter.
        self._served_at = 0.0
        # Not released because something outside of this package holds a view of them.
        self._lingering: dict[OffloadedParameter, None] = {}
        self._unsaved: deque[OffloadedParameter] = deque()
        # Whether the running pass may compute with values that lack the last steps; see `staleness`.
        self._may_be_stale = False
        # In a group: what this rank gathered for itself, outside of passes. In a pass it does not count.
        self._private: set[OffloadedParameter] = set()
        # What is being gathered, and must stay until whoever uses it has it.
        self._serving: Sequence[OffloadedParameter] = ()
        self._requests.on_arrival = self._arrived

    # ------------------------------------------------------------ passes

    def begin_forward(self, module: nn.Module, name: str, inputs: Any) -> None:
        """An outermost forward begins."""
        self._end_broken_pass()
        # What somebody holds a view of must not be stale.
        if self._lingering:
            self.fetch(self.lingering, name)
        grad = torch.is_grad_enabled()
        kind: Hashable = (name, module.training, grad, torch.is_inference_mode_enabled())
        self.forecast.begin_forward(kind, signature(inputs), lambda: module_order(module), grad)
        self._may_be_stale = grad
        if not grad:
            self._renew(self.residency.states())
        self._begin_pass()
        self._keep_what_comes()
        self.residency.new_pass()

    def end_forward(self, *, complete: bool) -> None:
        """The outermost forward ended. What a backward will need soon may stay."""
        if not self._in_forward:
            return
        self.forecast.end_forward(complete=complete)
        self._begin_pass()
        self._keep_what_comes()
        self.residency.new_pass()
        self.release(self.lingering)
        if not self.forecast.expects_backward:
            self._plan.iteration_ended()

    def begin_backward(self) -> None:
        """A backward begins that is not part of another one."""
        if self._in_forward:
            # As one that computes forces from energies: a part of that forward.
            return
        self._end_broken_pass()
        self.forecast.begin_backward()
        self._may_be_stale = True
        self._begin_pass()
        self.residency.new_pass()

    def end_backward(self) -> None:
        """Releases all that backward gathered, also what graphs that are kept will need once more."""
        if not self._in_forward:
            self.forecast.end_backward(complete=True)
        self._let_go()

    def sweep(self) -> None:
        """Between passes nothing stays but what an expected backward needs, whatever an exception left."""
        self._end_broken_pass()
        self._let_go()

    @property
    def _in_forward(self) -> bool:
        return self.forecast.running and not self.forecast.in_backward

    def _let_go(self) -> None:
        self._unsaved.clear()
        self._keep_what_comes()
        self.release(self.lingering)

    def stepped(self) -> None:
        """The job is at its next step, and what is here is of the one before."""
        self._plan.iteration_ended()
        self.forecast.stepped()
        self._keep_what_comes()
        self.residency.new_step()

    def forget(self) -> None:
        """The links have ended, and what is here was perhaps never a state of the job: all of it goes."""
        self._end_broken_pass()
        self._drain()
        self._unsaved.clear()
        self.assigned = False
        self._plan.forget()
        self.forecast.stepped()
        self._private.clear()
        self._serving = ()
        self.discard_all()

    def _begin_pass(self) -> None:
        for state in self._private:
            # Gathered once more with the other ranks, to the same bytes, if the pass needs it.
            if state.request is not None:
                self._outlast(state.request)
            state.version = NOT_HERE
        self.release(self._private)
        self._private.clear()
        self._frontier = self.forecast.place
        self._served_at = time.perf_counter()

    def _end_broken_pass(self) -> None:
        """An exception or an interrupt may have ended a pass before its end."""
        if not self.forecast.running:
            return
        if self.forecast.in_backward:
            self.forecast.end_backward(complete=False)
        else:
            self.forecast.end_forward(complete=False)

    def _keep_what_comes(self) -> None:
        """Of what is here or on its way keeps what is used next soon enough."""
        for request in self._requests.unsettled():
            if all(self.forecast.next_use(state) is None for state in request.states):
                self._drain()
                break
        self.release(self.residency.states())

    # ------------------------------------------------------------ gather

    @property
    def staleness(self) -> int:
        """How many steps what is asked for may be behind: in forwards that a backward may follow, and in backwards.

        All else gets what the last step made.
        """
        if not self._may_be_stale or not self.forecast.running or self._job.read_only:
            return 0
        return self._config.max_staleness

    def _renew(self, states: Iterable[OffloadedParameter]) -> None:
        """What is here of these, or on its way, does not count if it may be behind the job's step."""
        if not self._config.max_staleness:
            return
        for state in states:
            if state.request is not None and state.request.max_staleness:
                self._outlast(state.request)
            if state.stale:
                state.version, state.stale = NOT_HERE, False

    def fetch(
        self, states: Sequence[OffloadedParameter], who: str, *, private: bool = True, exact: bool = False
    ) -> None:
        """Returns when all the parameters are whole and at the job's version.

        who: the module that uses them, for messages and statistics.
        private: outside of passes, whether other ranks need not do the same.
        exact: whatever `max_staleness` is.
        """
        version = self._job.step
        staleness = 0 if exact else self.staleness
        if not staleness:
            self._renew(states)
        self._serving = states
        if self.forecast.running:
            self._note_uses(states, version, who)
        elif self._group is not None and private:
            self._private.update(state for state in states if state.version != version)
        if all(state.version == version for state in states):
            if self.forecast.running:
                self._look_ahead()
            return
        # First: among what backward is done with may be something that is wanted now.
        self.release_unsaved()
        self._job.check()
        self.pass_assignments()
        began = time.perf_counter()
        with self._plain_tensors(), self._profiled(who):
            self._gather(states, version, who, staleness)
        self._served_at = time.perf_counter()
        self.statistics.stalled(who, self._served_at - began)
        if self.timeline is not None:
            self.timeline.waited(who, began, self._served_at)

    def pass_assignments(self) -> None:
        """Before a pull: waits until every rank is past its assignments to released parameters."""
        if self.assigned:
            self._job.transfer.flush()
            self._job.barrier("values assigned to released parameters")
            self.assigned = False

    def _note_uses(self, states: Sequence[OffloadedParameter], version: int, who: str) -> None:
        gap = time.perf_counter() - self._served_at
        for state in states:
            self.forecast.use(state, gap)
            self._plan.used(state)
            gap = 0.0
            if not state.persistent:
                self.statistics.gather(hit=state.version == version or state.request is not None)
        self._served_at = time.perf_counter()
        if self.timeline is not None:
            self.timeline.used(states, who, self._served_at)

    def _gather(self, states: Sequence[OffloadedParameter], version: int, who: str, staleness: int) -> None:
        for state in states:
            # Asked for at another version than this: a step came in between.
            if state.request is not None and state.request.version != version:
                self._outlast(state.request)
        for state in states:
            # What a module waits for goes first, whoever asked for it, and does not make way for the rest of it.
            if state.request is not None:
                self._requests.hurry(state.request)
        missing = list(dict.fromkeys(s for s in states if s.version != version and s.request is None))
        if missing:
            self._announcement.pulled(missing)
            evicted = self.residency.evicted
            self._make_room(missing, states, who)
            if self.residency.evicted != evicted:
                # What went may be used before what the look-ahead has come to.
                self._frontier = self.forecast.place
            for state in missing:
                self.residency.allocate(state)
            self._submit(missing, version, staleness, urgent=True)
        if self.forecast.running:
            self._look_ahead()
        for state in states:
            if state.request is not None:
                self._await(state.request)

    def _await(self, request: Request) -> None:
        self._requests.wait(request)
        self._settle(request)

    def _settle(self, request: Request) -> None:
        try:
            self._requests.settle(request)
        finally:
            for state in request.states:
                self.residency.rank(state)

    def _outlast(self, request: Request) -> None:
        """Returns when nothing of a request is on its way any more, whatever came of it."""
        self._requests.wait(request)
        with contextlib.suppress(Exception):  # whoever needs it asks again, and hears of it
            self._settle(request)

    def _submit(self, states: Sequence[OffloadedParameter], version: int, staleness: int, *, urgent: bool) -> None:
        self._plan.asked(states)
        if self.timeline is not None:
            self.timeline.requested(states, time.perf_counter(), urgent=urgent)
        alone = not self.forecast.running
        self._requests.submit(states, version, urgent=urgent, alone=alone, max_staleness=staleness)

    def _arrived(self, request: Request) -> None:
        """From any thread."""
        if self.timeline is not None:
            self.timeline.arrived(request.states, request.arrived_at)

    def _make_room(self, missing: Sequence[OffloadedParameter], states: Sequence[OffloadedParameter], who: str) -> None:
        """Makes room for what a module waits for. Raises OutOfBudget if there can be none."""
        new = [state for state in missing if not state.resident_bytes]
        nbytes, elements = sum(map(cost, new)), sum(state.numel for state in new)
        keep = set(states)
        if self.residency.make_room(nbytes, elements, -1, keep):
            return
        # What was asked for ahead of time makes way: first what has not left, then what is on its way.
        self._withdraw()
        for request in self._requests.unsettled():
            if self.residency.make_room(nbytes, elements, -1, keep):
                return
            self._outlast(request)
        if not self.residency.make_room(nbytes, elements, -1, keep):
            raise self.residency.out_of_budget(list(dict.fromkeys(states)), who)

    def fetch_for_good(self, states: Sequence[OffloadedParameter]) -> None:
        """Gathers what stops being offloaded, whatever the limits."""
        self.residency.max_bytes = self.residency.max_elements = math.inf
        self.fetch(states, "trainer.remove")

    def fetch_for_a_look(self, state: OffloadedParameter) -> None:
        """Gathers a parameter outside of any pass; it goes once nobody holds a view of it."""
        self.fetch((state,), state.module_name)
        self._lingering[state] = None

    # ------------------------------------------------------------ look ahead

    def _look_ahead(self) -> None:
        """Asks for what comes next: as far as there is room, and not sooner than is of use."""
        bucket_elements = self._config.prefetch_bucket_size
        if not bucket_elements or self.assigned:
            return
        version = self._job.step
        if self.forecast.jumped:
            # What was asked for along another path and has not left yet may not be needed any more.
            self._withdraw()
            self.forecast.jumped = False
        self._frontier = max(self._frontier, self.forecast.place)
        while (state := self.forecast.at(self._frontier)) is not None:
            if state.version == version or state.request is not None:
                self._frontier += 1
                continue
            if not self._is_due(bucket_elements):
                return
            with self._plain_tensors():
                bucket = self._next_bucket(bucket_elements, version)
                self._announcement.pulled(bucket)
                for together in small_ones_together(bucket):
                    self._submit(together, version, self.staleness, urgent=False)
            if not bucket:
                return

    def _is_due(self, bucket_elements: int) -> bool:
        """Whether what is at the frontier has to be asked for now."""
        if self._group is None:
            return self.forecast.is_due(self._frontier, self._requests.backlog_bytes)
        return self.forecast.distance(self._frontier) <= bucket_elements

    def _next_bucket(self, bucket_elements: int, version: int) -> list[OffloadedParameter]:
        """Takes from the frontier on what goes into one request, and gives it memory."""
        bucket: dict[OffloadedParameter, None] = {}
        keep = set(self._serving)
        elements = 0
        while (state := self.forecast.at(self._frontier)) is not None:
            if state.version != version and state.request is None and state not in bucket:
                if bucket and elements + state.numel > bucket_elements:
                    break
                if self._group is None and (state.active or state.aliased):
                    # In use at another version than this, by somebody who will have to wait for it.
                    break
                if self._announcement.is_final(state):
                    # Servers need not have this version any more.
                    self._frontier += 1
                    continue
                if not state.resident_bytes and not self._room_ahead(state, keep):
                    break
                self.residency.allocate(state)
                bucket[state] = None
                keep.add(state)
                elements += state.numel
            self._frontier += 1
        return list(bucket)

    def _room_ahead(self, state: OffloadedParameter, keep: Container[OffloadedParameter]) -> bool:
        """Makes room by evicting what is used later than what is at the frontier. Whether there is."""
        need = cost(state), state.numel, self._frontier, keep
        if self.residency.make_room(*need) or self._group is not None:
            return self.residency.has_room(*need[:2])
        # What came and was not used may have been a mistake.
        done = [request for request in self._requests.unsettled() if request.done]
        for request in done:
            with contextlib.suppress(Exception):  # whoever needs it asks again, and hears of it
                self._settle(request)
        return bool(done) and self.residency.make_room(*need)

    def _withdraw(self) -> None:
        """Takes back what was asked for ahead of time and has not left."""
        for request in self._requests.withdraw():
            for state in request.states:
                self.residency.free(state)
        self._frontier = self.forecast.place

    def _drain(self) -> None:
        """Leaves nothing on its way."""
        self._withdraw()
        for request in self._requests.unsettled():
            self._outlast(request)

    # ------------------------------------------------------------ release

    def release(self, states: Iterable[OffloadedParameter]) -> None:
        """Lets go of every parameter that is not in use and not persistent.

        What is used again soon stays for the time being: it is idle, and goes when its room is needed.
        """
        for state in states:
            if state.active or state.persistent or state.request is not None or not state.resident_bytes:
                continue
            if state.aliased:
                self._lingering[state] = None
                if self._group is not None and not self._is_needed_soon(state):
                    # The other ranks let go of it.
                    state.version = NOT_HERE
                continue
            self._lingering.pop(state, None)
            if state not in self._private and self._is_needed_soon(state):
                self.residency.rank(state)
            else:
                self._ask_again(state)
                self.residency.free(state)

    def _ask_again(self, state: OffloadedParameter) -> None:
        """The parameter goes before a use that counted as served by what is here."""
        place = self.forecast.next_use(state)
        if place is not None and place < self._frontier:
            self._frontier = place

    def _is_needed_soon(self, state: OffloadedParameter) -> bool:
        if state.version != self._job.step:
            return False
        place = self.forecast.next_use(state)
        return place is not None and self.forecast.distance(place) < self._config.max_reuse_distance

    def discard(self, state: OffloadedParameter) -> None:
        """What is here of a parameter does not count any more: it is about to be replaced or converted."""
        if state.request is not None:
            self._outlast(state.request)
        if not state.active and not state.aliased:
            self.residency.free(state)

    def disown(self, state: OffloadedParameter) -> None:
        """The parameter is about to get other memory, whoever holds views of what it has."""
        self.discard(state)
        self._lingering.pop(state, None)
        self.residency.disown(state)

    def discard_all(self) -> None:
        """Frees whatever is in nobody's use, also what would stay."""
        for state in self.residency.states():
            self.discard(state)

    def unsaved(self, state: OffloadedParameter) -> None:
        """Notes that no autograd graph needs the parameter any more; never blocks, from any thread."""
        self._unsaved.append(state)

    def release_unsaved(self) -> None:
        """Releases what backward is done with."""
        while self._unsaved:
            state = self._unsaved.popleft()
            if state.saved == 0:
                self.release((state,))

    def after_gradient(self, state: OffloadedParameter) -> None:
        """The parameter's gradient left. Should anything in backward still need it, it comes back."""
        self._plan.gradient_came(state)
        self.release_unsaved()
        self.release((state,))

    @property
    def lingering(self) -> list[OffloadedParameter]:
        return list(self._lingering)

    # ------------------------------------------------------------ seen from outside

    @property
    def timeline(self) -> "Timeline | None":
        """Where it is written down what happens when, if anywhere."""
        return self.residency.timeline

    @timeline.setter
    def timeline(self, timeline: "Timeline | None") -> None:
        self.residency.timeline = timeline

    @contextlib.contextmanager
    def _plain_tensors(self) -> Any:
        """Bytes are written by another thread, which torch would not let write to tensors that were made in
        inference mode. Nor is it anybody's business who follows what the model computes, as selective
        checkpointing does."""
        modes = _disable_current_modes() if torch._C._len_torch_dispatch_stack() else contextlib.nullcontext()
        with torch.inference_mode(False), torch.no_grad(), modes:
            yield

    def _profiled(self, who: str) -> Any:
        if torch._C._autograd._profiler_enabled():
            return torch.autograd.profiler.record_function(f"zero-ps gather {who}")
        return contextlib.nullcontext()


def in_backward() -> bool:
    """Whether this thread is running a backward pass."""
    return bool(torch._C._current_graph_task_id() != -1)
