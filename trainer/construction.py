"""Building a model of which this process never holds more than a part.

torch tells registered hooks when a module gets a parameter and when a module becomes part of another.
Between the two a module's constructor fills the parameter in, so parameters leave in the order in which
they came, when more than a bound is here, and never those of the module that is being filled.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parameter import is_lazy

from protos import dtypes
from protos.layout import ChunkGrid, Placement
from trainer.errors import ConfigError
from trainer.heap import trim_heap
from trainer.links import PushKind
from trainer.memory import MemoryPool
from trainer.parameter import NOT_HERE, OffloadedParameter, offloaded
from trainer.transfer import Destination, RemoteParameter

if TYPE_CHECKING:
    from trainer.job import Job

RESIDENT_BYTES = 64 << 20
"""How much of a model under construction stays here, besides the module that is being filled. Modules
that initialise their children's parameters again find those of the last few layers still here."""


@contextmanager
def construct(job: "Job") -> Iterator[None]:
    """See `Job.init`."""
    job.check()
    if job.read_only and not job.exists:
        raise ConfigError(f"job {job.name!r} has no state on the servers, and read_only=True cannot create it")
    construction = Construction(job)
    hooks = [
        register_module_parameter_registration_hook(construction.on_parameter),
        register_module_module_registration_hook(construction.on_module),
    ]
    try:
        yield
        construction.finish()
    finally:
        for hook in hooks:
            hook.remove()


class Construction:
    """Follows the building of a model in one thread and keeps what is here within `RESIDENT_BYTES`."""

    def __init__(self, job: "Job") -> None:
        self._job = job
        self.memory = MemoryPool()
        # Values count on rank 0 of a new job only; elsewhere they are replaced by the servers'.
        self._keeps_values = job.rank == 0 and not job.exists
        self._thread = threading.get_ident()
        self._placement = Placement(len(job.servers))
        self._count = 0
        # Whole parameters, least recently touched first.
        self._resident: OrderedDict[OffloadedParameter, int] = OrderedDict()
        self._filling: nn.Module | None = None
        self._freed = 0

    # The hooks see every module that any thread builds.
    def on_parameter(self, module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if threading.get_ident() != self._thread or not isinstance(param, nn.Parameter):
            return
        if is_lazy(param) or param.is_meta or param.numel() == 0 or offloaded(param) is not None:
            return
        state = OffloadedParameter(param, f"{type(module).__name__}.{name}", self)
        grid = ChunkGrid.of(state.shape)
        try:
            dtypes.from_torch(state.dtype)
        except ValueError as error:
            raise ConfigError(f"parameter {name!r} of a {type(module).__name__}: {error}") from None
        state.remote = RemoteParameter(
            index=self._count,
            name=state.name,
            dtype=state.dtype,
            grid=grid,
            shards=self._placement.place(grid),
            staged=True,
        )
        self._count += 1
        self._filling = module
        self._resident[state] = state.nbytes
        # torch calls this before the module has the parameter.
        self._shrink(RESIDENT_BYTES, keep=(state,))

    def on_module(self, module: nn.Module, name: str, child: nn.Module | None) -> None:
        if threading.get_ident() == self._thread and child is self._filling:
            self._filling = None
            self._shrink(RESIDENT_BYTES)

    def touch(self, states: Sequence[OffloadedParameter], func: Callable[..., Any]) -> None:
        """Brings parameters back that a constructor reads or changes after they left."""
        for state in states:
            state.allocate()
            # What a constructor does with values that are not kept must not fail on what memory held.
            if not self._keeps_values:
                state.bytes_view().zero_()
        if self._keeps_values:
            buffers = [
                torch.empty(s.nbytes, dtype=torch.uint8) if s.device.type != "cpu" else s.bytes_view() for s in states
            ]
            self._job.transfer.pull(
                [Destination(_remote(s), b, s.dtype) for s, b in zip(states, buffers, strict=True)], 0
            ).wait()
            for state, buffer in zip(states, buffers, strict=True):
                if state.device.type != "cpu":
                    state.bytes_view().copy_(buffer)
        for state in states:
            state.version = 0
            state.activate()
            self._resident[state] = state.nbytes
        self._shrink(RESIDENT_BYTES, keep=states)

    def in_pass(self) -> bool:
        return True

    def assign(self, state: OffloadedParameter, values: torch.Tensor) -> bool:
        return False

    def converting(self, state: OffloadedParameter) -> None:
        pass

    def converted(self, state: OffloadedParameter) -> None:
        pass

    def finish(self) -> None:
        """Sends what is still here."""
        self._filling = None
        self._shrink(0)

    def _shrink(self, limit: int, keep: Sequence[OffloadedParameter] = ()) -> None:
        """Lets parameters leave, oldest first, until at most `limit` bytes are here."""
        total = sum(self._resident.values())
        leaving = []
        filling = set(self._filling.parameters(recurse=False)) if self._filling is not None else set()
        for state in list(self._resident):
            if total <= limit:
                break
            param = state._param()
            if param is None:
                # Replaced by another one, as when weights are tied.
                total -= self._resident.pop(state)
                continue
            if param in filling or state in keep:
                continue
            _adopt(state)
            if state.aliased:
                continue
            total -= self._resident.pop(state)
            leaving.append(state)
        if self._keeps_values:
            for state in leaving:
                self._job.transfer.push(_remote(state), state.whole().cpu(), PushKind.STAGED, step=0)
            self._job.transfer.flush()
        for state in leaving:
            if state.active:
                state.deactivate()
            else:
                state.guard()
            state.free()
        # The blocks were malloc's, from the module's own constructor.
        self._freed += sum(state.nbytes for state in leaving)
        if self._freed > RESIDENT_BYTES or limit == 0:
            trim_heap()
            self._freed = 0


def _remote(state: OffloadedParameter) -> RemoteParameter:
    assert state.remote is not None
    return state.remote


def _adopt(state: OffloadedParameter) -> None:
    """Takes over a storage that a constructor assigned through `.data`, in C order and as a whole."""
    param = state.param
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        storage = param.untyped_storage()
        if storage.nbytes() != state.nbytes or not param.is_contiguous() or param.storage_offset():
            param.data = param.detach().clone(memory_format=torch.contiguous_format)
    if param.untyped_storage()._cdata != state.address:
        state.adopt_storage()
        state.version = NOT_HERE
