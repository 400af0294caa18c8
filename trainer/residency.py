"""Which parameters have memory here, and that they never have more than they may.

Counted is what is really resident: parameters that are whole, those whose bytes are on their way, and
buffers in which bytes are staged for a device. Memory is taken on the thread that runs the model, so a
limit holds at every instant without a lock.
"""

import heapq
import itertools
import math
from collections.abc import Container, Iterator, Sequence

import torch

from protos.sizes import format_bytes
from trainer.config import OffloadConfig
from trainer.errors import OutOfBudget
from trainer.forecast import Forecast
from trainer.memory import MemoryPool
from trainer.parameter import OffloadedParameter
from trainer.timeline import Timeline

_Entry = tuple[float, int, OffloadedParameter]


class Residency:
    """The memory of one model's parameters.

    live_bytes, live_elements: what is resident now; peak_bytes, peak_elements: the most there ever was.
    evicted: how often a parameter had to go before its next use to make room.
    """

    def __init__(self, config: OffloadConfig, memory: MemoryPool, forecast: Forecast) -> None:
        self.max_bytes = math.inf if config.max_live_bytes is None else config.max_live_bytes
        self.max_elements: float = config.max_live_parameters
        self.live_bytes = 0
        self.live_elements = 0
        self.peak_bytes = 0
        self.peak_elements = 0
        self.evicted = 0
        self.timeline: Timeline | None = None
        self._memory = memory
        self._forecast = forecast
        self._resident: dict[OffloadedParameter, None] = {}
        # By next use, the furthest first; what it says may be out of date.
        self._furthest: list[_Entry] = []
        self._tie = itertools.count()

    # ------------------------------------------------------------ memory

    def allocate(self, state: OffloadedParameter) -> None:
        """Gives a parameter its memory, with undefined content. Whoever calls made room."""
        if state.resident_bytes == state.nbytes:
            return
        if self.max_bytes < math.inf:
            # Memory that waits to be used again is resident, too.
            self._memory.shrink(max(0, int(self.max_bytes) - self.live_bytes - cost(state)))
        state.allocate()
        self._resident[state] = None
        self.live_bytes += cost(state)
        self.live_elements += state.numel
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self.peak_elements = max(self.peak_elements, self.live_elements)
        if self.timeline is not None:
            self.timeline.live(self.live_bytes)

    def free(self, state: OffloadedParameter) -> None:
        """Takes a parameter's memory back."""
        if state in self._resident:
            self.disown(state)
            state.free()

    def disown(self, state: OffloadedParameter) -> None:
        """The parameter's memory is not the model's any more: whoever holds views of it has it alone."""
        if state in self._resident:
            del self._resident[state]
            self.live_bytes -= cost(state)
            self.live_elements -= state.numel
            if self.timeline is not None:
                self.timeline.released(state, self.live_bytes)

    def states(self) -> list[OffloadedParameter]:
        """Everything that has memory here."""
        return list(self._resident)

    # ------------------------------------------------------------ room

    def rank(self, state: OffloadedParameter) -> None:
        """The parameter is whole, or was used, and may go when there is need of room."""
        if not state.persistent:
            heapq.heappush(self._furthest, self._entry(state))

    def new_pass(self) -> None:
        """Places are counted anew."""
        self._furthest = [self._entry(state) for state in self._resident if not state.persistent]
        heapq.heapify(self._furthest)

    def new_step(self) -> None:
        """How much memory waits to be used again goes by what steps take."""
        self._memory.new_round()

    def _entry(self, state: OffloadedParameter) -> "_Entry":
        place = self._forecast.next_use(state)
        return (-math.inf if place is None else -place, next(self._tie), state)

    def has_room(self, nbytes: int, elements: int) -> bool:
        return self.live_bytes + nbytes <= self.max_bytes and self.live_elements + elements <= self.max_elements

    def check(self, nbytes: int, elements: int, module: str) -> None:
        """Raises OutOfBudget if a module's parameters, of that many, cannot be whole, even alone."""
        if nbytes > self.max_bytes or elements > self.max_elements:
            raise self._error(module, nbytes, elements, 0, 0)

    def out_of_budget(self, states: Sequence[OffloadedParameter], module: str) -> OutOfBudget:
        """The error of a module whose parameters cannot be whole at once beside what is in use."""
        nbytes, elements = sum(map(cost, states)), sum(state.numel for state in states)
        here = [state for state in states if state.resident_bytes]
        other_bytes = self.live_bytes - sum(map(cost, here))
        return self._error(module, nbytes, elements, other_bytes, self.live_elements - sum(s.numel for s in here))

    def _error(self, module: str, nbytes: int, elements: int, other_bytes: int, other_elements: int) -> OutOfBudget:
        if other_bytes + nbytes > self.max_bytes:
            needs, limit = f"{_size(nbytes)} of parameters", f"max_live_bytes is {_size(self.max_bytes)}"
            beside = f" beside {_size(other_bytes)} that are in use" if other_bytes else ""
        else:
            needs, limit = f"{elements} elements of parameters", f"max_live_parameters is {self.max_elements}"
            beside = f" beside {other_elements} that are in use" if other_elements else ""
        return OutOfBudget(
            f"module {module!r} needs {needs} at once{beside}, and OffloadConfig.{limit}; raise the limit, or split "
            "the module into smaller ones"
        )

    def make_room(self, nbytes: int, elements: int, place: float, keep: Container[OffloadedParameter] = ()) -> bool:
        """Evicts what is used after a place, the furthest first, until there is room. Whether there is."""
        if self.has_room(nbytes, elements):
            return True
        # Put back afterwards: what may not go now.
        passed_over: list[_Entry] = []
        for entry in self._by_distance():
            state = entry[2]
            if -entry[0] <= place:
                passed_over.append(entry)
                break
            if state in keep or state.active or state.request is not None or state.aliased:
                passed_over.append(entry)
                continue
            self.free(state)
            self.evicted += 1
            if self.has_room(nbytes, elements):
                break
        for entry in passed_over:
            heapq.heappush(self._furthest, entry)
        return self.has_room(nbytes, elements)

    def _by_distance(self) -> Iterator["_Entry"]:
        """Takes parameters from the heap, the one that is used last first."""
        while self._furthest:
            key, _, state = heapq.heappop(self._furthest)
            if state not in self._resident:
                continue
            entry = self._entry(state)
            if entry[0] > key:
                # It is used sooner than it was when it was put here.
                heapq.heappush(self._furthest, entry)
                continue
            yield entry


def _size(nbytes: float) -> str:
    """Exact, since a limit may be missed by a few bytes."""
    return f"{nbytes} bytes ({format_bytes(nbytes)})" if nbytes >= 1024 else f"{nbytes} bytes"


def cost(state: OffloadedParameter) -> int:
    """Bytes that a gathered parameter counts as."""
    return cost_of(state.nbytes, state.device)


def cost_of(nbytes: int, device: torch.device) -> int:
    """Bytes that so many count as on a device: on another than the CPU those that pass through pinned
    memory, too."""
    return nbytes if device.type == "cpu" else 2 * nbytes
