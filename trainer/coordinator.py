"""Decides what to request from the servers and what to let go.

Here it fetches what is needed when it is needed and releases it as soon as nothing needs it. Looking ahead
along a recorded trace, and budgets, take their place behind these same calls.
"""

import contextlib
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch.utils._python_dispatch import _disable_current_modes

from trainer.parameter import OffloadedParameter
from trainer.transfer import Destination

if TYPE_CHECKING:
    from trainer.job import Job


class Coordinator:
    """Gathers and releases the parameters of one model.

    One thread at a time runs a model forward or backward, and calls this; only `unsaved` may come from
    any thread.
    """

    def __init__(self, job: "Job") -> None:
        self._job = job
        # Gathered for backward, to be released at the latest when it ends.
        self._for_backward: dict[OffloadedParameter, None] = {}
        # Not released because something outside of this package holds a view of them.
        self._lingering: dict[OffloadedParameter, None] = {}
        self._unsaved: deque[OffloadedParameter] = deque()
        # Values were assigned to released parameters; every rank has to be past that before any pulls.
        self.assigned = False

    # ------------------------------------------------------------ gather

    def fetch(self, states: Iterable[OffloadedParameter]) -> None:
        """Returns when all the parameters are whole and at the job's version."""
        version = self._job.step
        states = list(states)
        if all(state.version == version for state in states):
            return
        # First: among what backward is done with may be something that is wanted now.
        self.release_unsaved()
        missing = [state for state in states if state.version != version]
        self._job.check()
        if self.assigned:
            self._job.transfer.flush()
            self._job.barrier("values assigned to released parameters")
            self.assigned = False
        # Bytes are written by another thread, which torch would not let write to tensors that were made
        # in inference mode.
        # Nor is it anybody's business who follows what the model computes, as selective checkpointing does.
        modes = _disable_current_modes() if torch._C._len_torch_dispatch_stack() else contextlib.nullcontext()
        with torch.inference_mode(False), torch.no_grad(), modes:
            self._pull(missing, version)

    def _pull(self, states: Sequence[OffloadedParameter], version: int) -> None:
        destinations = []
        try:
            for state in states:
                state.allocate()
                assert state.remote is not None
                destinations.append(Destination(state.remote, state.landing(), state.dtype))
            self._job.transfer.pull(destinations, version).wait()
            for state, destination in zip(states, destinations, strict=True):
                state.land(destination.buffer)
                state.version = version
        except BaseException:
            destinations.clear()
            self.release(states)
            raise

    def fetch_for_backward(self, state: OffloadedParameter) -> None:
        """Gathers a parameter until nothing in the running backward needs it."""
        self.fetch((state,))
        self._for_backward[state] = None

    def fetch_for_a_look(self, state: OffloadedParameter) -> None:
        """Gathers a parameter outside of any pass; it goes once nobody holds a view of it."""
        self.fetch((state,))
        self._lingering[state] = None

    # ------------------------------------------------------------ release

    def release(self, states: Iterable[OffloadedParameter]) -> None:
        """Gives the memory back of every parameter that is not in use and not persistent."""
        for state in states:
            if state.active or state.persistent or not state.resident_bytes:
                continue
            if state.aliased:
                self._lingering[state] = None
            else:
                state.free()
                self._for_backward.pop(state, None)
                self._lingering.pop(state, None)

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
        """The parameter has its gradient. Should anything in backward still need it, it comes back."""
        self.release_unsaved()
        self.release((state,))

    def end_of_backward(self) -> None:
        """Releases all that backward gathered, also what graphs that are kept will need once more."""
        self._unsaved.clear()
        self.release(list(self._for_backward))
        self._for_backward.clear()
        self.release_lingering()

    def release_lingering(self) -> None:
        """Releases what was kept for a view that is gone by now."""
        self.release(list(self._lingering))

    def sweep(self) -> None:
        """Releases what an exception left."""
        self.end_of_backward()

    @property
    def lingering(self) -> list[OffloadedParameter]:
        return list(self._lingering)


def in_backward() -> bool:
    """Whether this thread is running a backward pass."""
    return bool(torch._C._current_graph_task_id() != -1)
