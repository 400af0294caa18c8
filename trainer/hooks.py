"""The hooks around each submodule's forward: gather before, release after.

A thread keeps a stack of the forwards that it is in. A frame holds the parameters that its forward has in
use: the module's own, those it is known to use of other modules (external parameters), and those that it
turns out to use while it runs.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from trainer import saved
from trainer.errors import ConfigError, ModifiedParameterError
from trainer.parameter import NOT_HERE, OffloadedParameter, offloaded
from trainer.units import is_compiled

if TYPE_CHECKING:
    from trainer.offload import OffloadedModel


_FORGET_AFTER = 3
"""Forwards in a row without using an external parameter, after which it is not fetched beforehand."""


class Frame:
    """One running forward."""

    __slots__ = ("began_at", "expected", "hooks_saved", "states", "unit")

    def __init__(self, unit: "Unit") -> None:
        self.unit = unit
        self.states: list[tuple[OffloadedParameter, int]] = []
        # Gathered because earlier forwards turned out to use them; still guarded, so that it shows.
        self.expected: list[OffloadedParameter] = []
        self.hooks_saved = False
        self.began_at = 0.0

    def use(self, states: Sequence[OffloadedParameter]) -> None:
        """Gathers parameters and keeps them in use until the forward ends."""
        self._fetch(states)
        for state in states:
            state.activate()
            self.states.append((state, state.param._version))

    def expect(self, states: Sequence[OffloadedParameter]) -> None:
        """Gathers parameters that the forward will probably use."""
        self._fetch(states)
        self.expected.extend(states)

    def _fetch(self, states: Sequence[OffloadedParameter]) -> None:
        for model in dict.fromkeys(state.model for state in states):
            model.coordinator.fetch([state for state in states if state.model is model], self.unit.name)

    def end(self) -> None:
        """Raises ModifiedParameterError when the forward changed a parameter: the change would be lost."""
        if self.hooks_saved:
            saved.pop_hooks()
        changed = []
        for state, version in self.states:
            if (state.param._version != version or state.replaced) and state.version != NOT_HERE:
                state.version = NOT_HERE
                changed.append(state)
            state.deactivate()
        for state, _ in self.states:
            state.model.coordinator.release((state,))
        for state in self.expected:
            state.model.coordinator.release((state,))
        if changed:
            names = ", ".join(repr(state.name) for state in changed)
            raise ModifiedParameterError(
                f"parameter {names} was changed in place in the forward of module {self.unit.name!r}; what a forward "
                "changes is not kept. Change it between steps, inside trainer.gathered(..., modify=True)"
            )


class _Frames(threading.local):
    def __init__(self) -> None:
        self.stack: list[Frame] = []


_frames = _Frames()


def current_frame() -> Frame | None:
    """The innermost forward that this thread is in, of any offloaded model."""
    return _frames.stack[-1] if _frames.stack else None


def end_abandoned(model: "OffloadedModel") -> None:
    """Ends forwards that a KeyboardInterrupt left: torch calls no hook then.

    To be called where the thread cannot be inside a forward of the model.
    """
    while _frames.stack and _frames.stack[-1].unit.model is model:
        _frames.stack.pop().end()


class Unit:
    """A submodule with its hooks.

    leaf: whether it is gathered together with everything below it, which has no hooks then.
    external: parameters of other modules that its forward was seen to use, and for how many forwards in a
        row each was not.
    """

    def __init__(self, module: nn.Module, name: str, model: "OffloadedModel", leaf: bool) -> None:
        self.module = module
        self.leaf = leaf
        self.name = name
        self.model = model
        self.external: dict[OffloadedParameter, int] = {}
        before: Callable[..., None] = self._before_forward
        after: Callable[..., None] = self._after_forward
        if is_compiled(module):
            # What torch compiles of such a module includes its hooks, which only make sense as they are.
            before = torch.compiler.disable(before)  # type: ignore[no-untyped-call]
            after = torch.compiler.disable(after)  # type: ignore[no-untyped-call]
        self._handles = [
            module.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
            # always_call: after an exception too.
            module.register_forward_hook(after, always_call=True),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def add_external(self, state: OffloadedParameter) -> None:
        """The running forward uses the parameter."""
        self.external[state] = -1

    def _before_forward(self, module: nn.Module, args: object, kwargs: object) -> None:
        stack = _frames.stack
        if not stack or stack[-1].unit.model is not self.model:
            self.model.before_root_forward(self, (args, kwargs))
        frame = Frame(self)
        # First of all, so that the hook after forward finds it whatever happens here.
        stack.append(frame)
        params = module.parameters() if self.leaf else module._parameters.values()
        states = []
        for param in params:
            if param is None:
                continue
            state = offloaded(param)
            if state is not None:
                if not state.by_rows:
                    states.append(state)
            elif param.numel():
                raise self._not_offloaded(param)
        frame.use(states)
        if self.external:
            frame.expect([state for state in self.external if state not in states])
        if not torch.is_inference_mode_enabled():
            # Under no_grad too, which a forward may switch off again for a part of it. And for a module
            # without parameters: it may turn out to use another's, and torch's stack of hooks has to be
            # left as it was found, so they cannot be pushed in the middle.
            frame.hooks_saved = saved.push_hooks()
            for state in states:
                state.model.gradients.watch(state)
        if self.model.coordinator.timeline is not None:
            frame.began_at = time.perf_counter()

    def _forget_unused(self) -> None:
        """Stops expecting what several forwards in a row did not use, as experts that are not chosen."""
        for state, unused in list(self.external.items()):
            if unused >= _FORGET_AFTER:
                del self.external[state]
            else:
                self.external[state] = unused + 1

    def _not_offloaded(self, param: nn.Parameter) -> ConfigError:
        name = next(name for name, found in self.module.named_parameters(self.name) if found is param)
        return ConfigError(
            f"parameter {name!r} was replaced or added after trainer.offload, so no server has it; change values by "
            "trainer.gathered(..., modify=True) or load_state_dict(), or call trainer.remove(model) and offload again"
        )

    def _after_forward(self, module: nn.Module, args: object, output: object) -> None:
        stack = _frames.stack
        if stack and stack[-1].unit is self:
            frame = stack.pop()
            if (timeline := self.model.coordinator.timeline) is not None and frame.began_at:
                timeline.ran(self.name, frame.began_at, time.perf_counter())
            frame.end()
            if self.external:
                self._forget_unused()
            if not stack or stack[-1].unit.model is not self.model:
                # torch calls this with None after an exception.
                self.model.after_root_forward(complete=output is not None)
