"""What a model will use next: the pass that is running and, of a forward, the backward that will follow.

Places are counted from the beginning of the running pass on and go on in the backward, so that of two uses
the one with the smaller place comes first.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import nn

from trainer.pace import Pace
from trainer.parameter import OffloadedParameter, offloaded
from trainer.trace import Path, Trace

_FORWARDS = 16
"""Of how many forwards at most a backward is told apart by."""

_Path = Path[OffloadedParameter]


class Forecast:
    """Follows forwards and backwards of one model. Used by one thread at a time."""

    def __init__(self, pace: Pace) -> None:
        self.trace: Trace[OffloadedParameter] = Trace()
        self._pace = pace
        # Forwards whose backward has not come, oldest first, and how many backwards came since the last.
        self._forwards: list[_Path] = []
        self._backwards = 0
        # What forwards used and their backwards did not, as the bias of a linear layer.
        self._forward_only: OrderedDict[OffloadedParameter, None] = OrderedDict()
        # The backward that will follow the running forward, or the forward that ended last.
        self._beyond: _Path | None = None
        self._in_backward = False
        self._expects_backward = False
        # The running pass left the path that it was on, or went back on it.
        self.jumped = False

    # ------------------------------------------------------------ passes

    def begin_forward(
        self, kind: Hashable, inputs: Hashable, guess: Callable[[], Sequence[OffloadedParameter]], backward: bool
    ) -> None:
        """An outermost forward begins.

        kind, inputs: what forwards are told apart by; those with one kind are a family.
        guess: what a kind may use that was never seen.
        backward: whether one may follow it.
        """
        self.trace.begin(("forward", kind, inputs), guess, family=kind)
        self._in_backward = False
        self._expects_backward = backward
        self._prepare()

    def begin_backward(self) -> None:
        """A backward begins, of the forwards since the last one."""
        key = ("backward", tuple(path.number for path in self._forwards), self._backwards)
        self._backwards += 1
        self.trace.begin(key, self._guess_backward)
        self._in_backward = True
        self._expects_backward = False
        self._prepare()

    def use(self, state: OffloadedParameter, gap: float) -> None:
        """The running pass uses a parameter, `gap` seconds of compute after the one before."""
        path, place = self.trace.path, self.trace.place
        if self.trace.use(state, gap):
            return
        if self.trace.path is not path:
            self._switched(self.trace.path)
            self.jumped = True
        elif self.trace.place < place:
            self.jumped = True

    def end_forward(self, *, complete: bool) -> None:
        """The outermost forward ended."""
        path = self.trace.end(complete=complete)
        if path is None or not self._expects_backward:
            self._beyond = None
            return
        if self._backwards:
            self._forwards, self._backwards = [], 0
        self._forwards = [*self._forwards, path][-_FORWARDS:]
        self._beyond = self._backward_of(path)
        if not self._beyond.seen:
            # A forward of which no graph is left, as in an evaluation without no_grad, has no backward.
            self._beyond = Path([state for state in self._beyond.items if state.saved], seen=False)
        self._pace.prepare(self._beyond)

    def end_backward(self, *, complete: bool) -> None:
        path = self.trace.end(complete=complete)
        self._beyond = None
        if path is None or not self._forwards:
            return
        if self._backwards == 1:
            self._forwards[-1].backward = path
        used = set(path.items)
        for state in dict.fromkeys(state for forward in self._forwards for state in forward.items):
            if state in used:
                self._forward_only.pop(state, None)
            else:
                self._forward_only[state] = None

    def stepped(self) -> None:
        """Parameters have new values, so no backward of a forward before can come."""
        self._forwards, self._backwards = [], 0
        self._beyond = None

    @property
    def expects_backward(self) -> bool:
        """Whether a backward may follow what runs or ran last."""
        return self._beyond is not None

    @property
    def running(self) -> bool:
        return self.trace.running

    @property
    def in_backward(self) -> bool:
        """Whether the running pass is a backward."""
        return self._in_backward

    def _prepare(self) -> None:
        path = self.trace.path
        self._beyond = None
        if self._expects_backward:
            self._beyond = self._backward_of(path)
            self._pace.prepare(self._beyond)
        self._pace.prepare(path, self._beyond.lead[0] if self._beyond is not None and self._beyond.lead else 0.0)

    def _switched(self, path: _Path) -> None:
        """The pass goes on along another path; cheaper than `_prepare`, since it may happen often."""
        if not path.lead:
            self._pace.prepare(path)
        if self._expects_backward and path.backward is not None:
            self._beyond = path.backward
            if not self._beyond.lead:
                self._pace.prepare(self._beyond)

    def _guess_backward(self) -> Sequence[OffloadedParameter]:
        if len(self._forwards) == 1 and self._forwards[0].backward is not None:
            return self._forwards[0].backward.items
        return self._reversed(self._forwards)

    def _backward_of(self, forward: _Path) -> _Path:
        return forward.backward or Path(self._reversed([forward]), seen=False)

    def _reversed(self, forwards: Sequence[_Path]) -> list[OffloadedParameter]:
        return [
            state
            for forward in reversed(forwards)
            for state in reversed(forward.items)
            if state not in self._forward_only
        ]

    # ------------------------------------------------------------ what comes

    @property
    def place(self) -> int:
        """Of the next use."""
        return self.trace.place if self.trace.running else len(self.trace.path.items)

    def at(self, place: int) -> OffloadedParameter | None:
        """What is used at a place; None beyond what is known."""
        items = self.trace.path.items
        if place < len(items):
            return items[place]
        place -= len(items)
        if self._beyond is not None and place < len(self._beyond.items):
            return self._beyond.items[place]
        return None

    def next_use(self, state: OffloadedParameter) -> int | None:
        """The place at which a parameter is used next, if it is known to be."""
        path = self.trace.path
        if self.trace.running:
            place = path.next_place(state, self.trace.place)
            if place is not None:
                return place
        if self._beyond is not None:
            place = self._beyond.next_place(state, 0)
            if place is not None:
                return len(path.items) + place
        return None

    def distance(self, place: int) -> int:
        """Elements of the parameters that are used before a place is reached."""
        path = self.trace.path
        here = self.place
        if place <= len(path.items):
            return path.elements_before(place) - path.elements_before(here)
        assert self._beyond is not None
        rest = path.elements_before(len(path.items)) - path.elements_before(here)
        return rest + self._beyond.elements_before(place - len(path.items))

    def is_due(self, place: int, backlog_bytes: int) -> bool:
        """Whether what is used at a place has to be asked for now rather than at the next use."""
        path, here = self.trace.path, self.place
        if place <= here or not path.seen:
            return True
        if place < len(path.items):
            seconds, lead = path.clock[place] - path.clock[here], path.lead[place]
        else:
            assert self._beyond is not None
            if not self._beyond.seen:
                return True
            seconds = self._beyond.clock[place - len(path.items)]
            if here < len(path.items):
                seconds += path.clock[-1] - path.clock[here]
            lead = self._beyond.lead[place - len(path.items)]
        return self._pace.is_due(seconds, lead, backlog_bytes)


def signature(value: Any) -> Hashable:
    """What tells inputs apart that may lead a model another way: shapes and dtypes, and what is no number."""
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.dtype)
    if isinstance(value, (tuple, list)):
        return tuple(map(signature, value))
    if isinstance(value, dict):
        return tuple((str(key), signature(item)) for key, item in value.items())
    if value is None or isinstance(value, (bool, str)):
        return value
    return str(type(value))


def module_order(module: nn.Module) -> list[OffloadedParameter]:
    """The parameters below a module in the order in which its submodules were registered."""
    params = (param for child in module.modules() for param in child._parameters.values() if param is not None)
    return [state for param in params if (state := offloaded(param)) is not None and not state.by_rows]
