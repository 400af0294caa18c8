"""Gradients of offloaded parameters: they leave for the servers during backward and add up there.

In `param.grad` a placeholder stays, so that what looks at it sees what torch would show: None before a
backward and after `zero_grad` (of the optimizer or of the module), something after a backward. The values
are on the servers; reading the placeholder is an error that says so.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from protos import zero_ps_pb2 as pb
from trainer.announcement import Announcement
from trainer.bundle import BUNDLE_BYTES
from trainer.config import OffloadConfig
from trainer.coordinator import Coordinator
from trainer.device import point
from trainer.errors import ConfigError, ReleasedParameterError
from trainer.grad_scaling import check_and_unscale, gradient_dtype
from trainer.group import TrainerGroup
from trainer.heap import Heap
from trainer.job import Job
from trainer.links import PushKind
from trainer.memory import MemoryPool, empty_of
from trainer.parameter import OffloadedParameter
from trainer.released import CONVERSIONS, METADATA, SET_DATA
from trainer.selection import Part, elements, rows
from trainer.server import call_all

_GET_DTYPE = torch.Tensor.dtype.__get__  # type: ignore[attr-defined]


class RemoteGradient(torch.Tensor):
    """Stands in `param.grad` for a gradient that is on the servers."""

    _zero_ps: OffloadedParameter
    _zero_ps_zeroed: bool
    """Set to zeros, of which servers have still to hear."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in CONVERSIONS and isinstance(args[0], RemoteGradient):
            return args[0]._converted(func, args[1:], kwargs or {})
        if func is torch._amp_foreach_non_finite_check_and_unscale_:
            check_and_unscale([gradient._zero_ps for gradient in args[0]], *args[1:])
            return None
        if func == _GET_DTYPE:
            return gradient_dtype(args[0]._zero_ps)
        if func is torch.Tensor.zero_:
            args[0]._zero_ps_zeroed = True
            return args[0]
        # `Module.to` sets `.data`.
        if func not in METADATA and func != SET_DATA:
            name = next((a._zero_ps.name for a in args if isinstance(a, RemoteGradient)), "?")
            raise ReleasedParameterError(
                f"the gradient of parameter {name!r} is on the servers, and {getattr(func, '__name__', func)!s} needs "
                "its values; use trainer.clip_grad_norm_ to clip, and the optimizer's zero_grad() to drop it"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def _converted(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> "RemoteGradient":
        """What `Module.to` makes of it: there are no values here to convert."""
        with torch._C.DisableTorchFunctionSubclass():
            empty = torch.empty(0, dtype=self.dtype, device=self.device)
        probe = func(empty, *args, **kwargs)
        return _placeholder(self._zero_ps, empty_of(self.shape, probe.dtype, probe.device))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"RemoteGradient({self._zero_ps.name!r}, shape={tuple(self.shape)}, dtype={self.dtype})"


class Gradients:
    """The gradients of one model's parameters that this trainer has sent and no `zero_grad` has dropped."""

    def __init__(
        self,
        job: Job,
        config: OffloadConfig,
        memory: MemoryPool,
        coordinator: Coordinator,
        announcement: Announcement,
        group: TrainerGroup | None = None,
    ) -> None:
        # What the next step does to the averaged gradients first; see `trainer.clipping`.
        self.edits: list[pb.GradEdit] = []
        # Whether a gradient was found that is not finite, and parameters whose gradients are known to be so.
        self.found_nonfinite = False
        self._skipped = 0
        self.known_finite: set[OffloadedParameter] = set()
        # Whether servers were asked for what takes the gradients of all trainers, so that none may follow.
        self.final = False
        self._job = job
        self._config = config
        self._memory = memory
        self._coordinator = coordinator
        self._group = group
        self._announcement = announcement
        self._sent: dict[OffloadedParameter, None] = {}
        limited = config.max_live_bytes is not None
        self._heap = Heap(tight=limited)
        self._outbox_bytes = config.max_inflight_push_bytes if limited else math.inf

    def watch(self, state: OffloadedParameter) -> None:
        """Has the parameter's gradient sent as soon as it is whole; for what is trained."""
        param = state.param
        if state.gradient_hooks or not param.requires_grad:
            return
        state.gradient_hooks = [
            param.register_hook(functools.partial(self._before_accumulation, state)),  # type: ignore[no-untyped-call]
            param.register_post_accumulate_grad_hook(functools.partial(self._after_accumulation, state)),  # type: ignore[no-untyped-call]
        ]

    def _before_accumulation(self, state: OffloadedParameter, gradient: torch.Tensor) -> None:
        """torch is about to add to `param.grad`, where the placeholder may be."""
        # Not for every parameter: it looks at all of them.
        if self.edits or (state in self._sent and ((present := _grad(state)) is None or _is_zeroed(present))):
            self.settle()
        # Refused while the placeholder is there, so that a step can still follow.
        self._announcement.check_expected(state)
        if self.edits:
            raise ConfigError(
                f"backward gave parameter {state.name!r} a gradient after the gradients of this step were clipped or "
                "unscaled, which servers do when all are there; do it after the last backward before step(), or call "
                "zero_grad() to begin anew"
            )
        if state in self._sent:
            _set_grad(state, None)

    def _after_accumulation(self, state: OffloadedParameter, param: torch.Tensor) -> None:
        gradient = _grad(state)
        assert gradient is not None
        _set_grad(state, None)
        with torch.no_grad():
            self._send(state, gradient.detach())
        _set_grad(state, _placeholder(state, empty_of(state.shape, state.dtype, state.device)))
        self._coordinator.after_gradient(state)

    def _send(self, state: OffloadedParameter, gradient: torch.Tensor) -> None:
        if self._job.read_only:
            raise ConfigError(
                f"job {self._job.name!r} was opened with read_only=True, and backward gave parameter {state.name!r} a "
                "gradient; run under torch.no_grad(), or connect without read_only"
            )
        if self._job.transfer.weights:
            raise ConfigError(
                f"backward gave parameter {state.name!r} a gradient inside trainer.ema_weights(), which is for "
                "evaluation; train outside of it"
            )
        assert state.remote is not None
        final = self._announcement.gradient_came(state, sparse=gradient.is_sparse)
        dtype = self._config.reduce_dtype or gradient.dtype
        parts: tuple[Part, ...] | None = None
        if gradient.is_sparse:
            gradient = gradient.coalesce()
            # Also to chunks that have none of the rows: the gradient is zero there, and not missing.
            parts = tuple(rows(state.remote.grid, gradient.indices()[0].cpu()))
            gradient = gradient.values()
        count = gradient.numel()
        # Each rank has other rows, so there is no part of them for each to move.
        group = self._group if parts is None else None
        if group is not None:
            count = group.size * group.part_elements(count)
        nbytes = count * dtype.itemsize
        self._job.transfer.reserve(nbytes, self._config.max_inflight_push_bytes)
        if group is None and gradient.device == self._job.device and nbytes >= BUNDLE_BYTES:
            self._push_from_device(state, gradient, dtype, parts, final)
        else:
            self._push_from_host(state, gradient, dtype, parts, final, group, count)
        state.contributions += 1
        self._sent[state] = None
        if gradient.device.type == "cpu":
            self._heap.gradient_left(nbytes, self._memory.mapped_bytes)

    def _push_from_device(
        self,
        state: OffloadedParameter,
        gradient: torch.Tensor,
        dtype: torch.dtype,
        parts: tuple[Part, ...] | None,
        final: bool,
    ) -> None:
        """Pushes a gradient from a copy on its device, which lives as long as it is on its way."""
        leaving = torch.empty(gradient.shape, dtype=dtype, device=gradient.device).copy_(gradient)
        self._push(state, leaving, parts, final, after=(point(gradient.device),))

    def _push_from_host(
        self,
        state: OffloadedParameter,
        gradient: torch.Tensor,
        dtype: torch.dtype,
        parts: tuple[Part, ...] | None,
        final: bool,
        group: TrainerGroup | None,
        count: int,
    ) -> None:
        """Pushes a gradient from a copy in host memory. count: its elements, and those that a group adds."""
        nbytes = count * dtype.itemsize
        # A copy, in memory that is used again and that servers read over a link that can: autograd's own block goes
        # back to the allocator at once.
        outbox = self._job.outbox if group is None else None
        if outbox is not None:
            # It is another one after the job was joined anew.
            outbox.arena.limit_bytes = self._outbox_bytes
        memory = outbox or self._memory
        block = memory.take(nbytes)
        leaving = torch.empty(0, dtype=dtype).set_(block)
        leaving[: gradient.numel()].view(gradient.shape).copy_(gradient)
        if group is not None:
            leaving[gradient.numel() :].zero_()
            self._reduce_scatter(group, state, leaving, block, final)
        else:
            self._push(state, leaving, parts, final, on_sent=functools.partial(memory.give, block))

    def _push(
        self,
        state: OffloadedParameter,
        leaving: torch.Tensor,
        parts: tuple[Part, ...] | None,
        final: bool,
        *,
        after: "tuple[torch.cuda.Event, ...]" = (),
        on_sent: Callable[[], None] | None = None,
    ) -> None:
        """As `Transfer.push`."""
        assert state.remote is not None
        self._job.transfer.push(
            state.remote,
            leaving,
            PushKind.GRADIENT,
            step=self._job.step,
            sequence=state.contributions,
            final=final,
            parts=parts,
            after=after,
            on_sent=on_sent,
        )

    def _reduce_scatter(
        self,
        group: TrainerGroup,
        state: OffloadedParameter,
        gradient: torch.Tensor,
        block: torch.UntypedStorage,
        final: bool,
    ) -> None:
        """Pushes this rank's part of the sum of the ranks' gradients, when all of them are there."""
        remote, step, sequence = state.remote, self._job.step, state.contributions
        part, nbytes = group.part(state.numel), gradient.nbytes
        assert remote is not None

        def push(total: torch.Tensor | None, error: BaseException | None) -> None:
            self._memory.give(block)
            try:
                if total is not None and error is None and part[0] < part[1]:
                    self._job.transfer.push(
                        remote,
                        total[: part[1] - part[0]],
                        PushKind.GRADIENT,
                        step=step,
                        sequence=sequence,
                        final=final,
                        parts=tuple(elements(remote.grid, *part, origin=part[0])),
                    )
            except Exception as failure:
                error = failure
            finally:
                self._job.transfer.let_go(nbytes, error)

        self._job.transfer.hold(nbytes)
        group.reduce_scatter(f"the gradient of {state.name!r} of step {step}", gradient, push)

    def drop(self, states: Iterable[OffloadedParameter], *, keep_zeros: bool = False) -> None:
        """Has the servers forget this trainer's gradients of some parameters; with `keep_zeros` they are 0 then."""
        states = list(states)
        # After a norm was taken also where nothing was sent: servers have to know that this rank begins anew.
        if self.final or any(state in self._sent for state in states):
            self._forget(states, keep_zeros)
        elif not self._sent:
            self._begin_anew()

    def _forget(self, states: Sequence[OffloadedParameter], keep_zeros: bool = False, anew: bool = True) -> None:
        self._job.check()
        self._announcement.check_none("dropping gradients, as zero_grad does,")
        self._job.transfer.flush()
        if anew:
            self._begin_anew()
        # No index means every parameter.
        some = set(states)
        indices = [] if some.issuperset(self._sent) else [s.remote.index for s in states if s.remote is not None]
        call_all(
            self._job.servers,
            "ZeroGrad",
            lambda server: pb.ZeroGradRequest(
                session_id=server.session_id, step=self._job.step, parameters=indices, keep_zeros=keep_zeros
            ),
            self._job.timeout,
        )
        for state in [state for state in states if state in self._sent]:
            state.contributions = 0
            if keep_zeros and (gradient := _grad(state)) is not None:
                gradient._zero_ps_zeroed = False  # type: ignore[attr-defined]
            else:
                del self._sent[state]
                _set_grad(state, None)

    def before_step(self, states: Sequence[OffloadedParameter]) -> None:
        """Makes the servers' gradients those that `param.grad` shows."""
        for state in states:
            gradient = _grad(state)
            if gradient is not None and not isinstance(gradient, RemoteGradient):
                raise ConfigError(
                    f"the gradient of parameter {state.name!r} was assigned; RemoteOptimizer.step() uses those that "
                    "backward computed. Set it to None, and have a backward give it"
                )
        self.settle()

    def stepped(self) -> None:
        """The next contribution is the first one of its step. What was sent stays until it is dropped, unless the
        step has done that."""
        if self._announcement.zero_grad:
            self.forget()
        else:
            self._begin_anew()
            for state in self._sent:
                state.contributions = 0
        self._announcement.stepped()

    def forget(self) -> None:
        """Servers have none of the gradients any more, so there are none."""
        self._begin_anew()
        for state in self._sent:
            state.contributions = 0
            _set_grad(state, None)
        self._sent.clear()

    @property
    def skipped(self) -> int:
        """How often gradients that were found not to be finite led to no step."""
        return self._skipped + self.found_nonfinite

    def _begin_anew(self) -> None:
        """What was found out about gradients, and was to be done to them, is of no more use."""
        self._skipped = self.skipped
        self.edits.clear()
        self.known_finite.clear()
        self.final = self.found_nonfinite = False

    def has(self, state: OffloadedParameter) -> bool:
        """Whether servers have a gradient of the parameter from this trainer."""
        return state in self._sent and _grad(state) is not None

    def edit(
        self, states: Iterable[OffloadedParameter], *, scale: float | None = None, max_value: float | None = None
    ) -> None:
        """Has the next step change the averaged gradients first: multiply them, or clamp them."""
        self._announcement.check_none("clipping or scaling gradients")
        indices = [state.remote.index for state in states if state.remote is not None]
        if scale is not None and not abs(scale) <= 1:
            self.known_finite.clear()
        self.edits.append(pb.GradEdit(parameters=indices, scale=scale, max_value=max_value))

    def settle(self) -> None:
        """Has the servers hear of what `Module.zero_grad()`, or an assignment of None, did to placeholders alone."""
        gradients = {state: _grad(state) for state in self._sent}
        gone = [state for state, gradient in gradients.items() if gradient is None]
        zeroed = [state for state, gradient in gradients.items() if _is_zeroed(gradient)]
        if gone or zeroed:
            self._announcement.gradients_dropped()
        # What was done to gradients that stay has still to be done to them.
        anew = len(gone) + len(zeroed) == len(gradients)
        if gone:
            self._forget(gone, anew=anew)
        if zeroed:
            self._forget(zeroed, keep_zeros=True, anew=anew)


def _grad(state: OffloadedParameter) -> torch.Tensor | None:
    with torch._C.DisableTorchFunctionSubclass():
        return state.param.grad


def _is_zeroed(gradient: torch.Tensor | None) -> bool:
    """Whether servers have still to hear that the gradient was set to zeros."""
    return getattr(gradient, "_zero_ps_zeroed", False)


def _set_grad(state: OffloadedParameter, gradient: torch.Tensor | None) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        state.param.grad = gradient


def _placeholder(state: OffloadedParameter, empty: torch.Tensor) -> RemoteGradient:
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        gradient: RemoteGradient = torch.Tensor._make_subclass(RemoteGradient, empty)
    gradient._zero_ps = state
    gradient._zero_ps_zeroed = False
    return gradient
