"""One parameter that lives on the servers: what is here of it, and since when.

A released parameter keeps its identity and its shape; only its storage is empty. Gathering refills that
same storage, so views of the parameter that autograd saved come back to life with it.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import nn

from trainer.memory import MemoryPool
from trainer.released import released_class

if TYPE_CHECKING:
    from trainer.offload import OffloadedModel
    from trainer.requests import Request
    from trainer.transfer import RemoteParameter

_ATTRIBUTE = "_zero_ps"

NOT_HERE = -1
"""`OffloadedParameter.version` while there are no bytes, or bytes that no longer count."""


class Owner(Protocol):
    """Who decides what happens when a released parameter is used: the construction, later the model.

    memory: where gathered parameters have theirs from.
    """

    memory: MemoryPool

    def touch(self, states: Sequence["OffloadedParameter"], func: Callable[..., Any]) -> None:
        """Makes the parameters usable for a call of `func`, or raises an error that names them."""

    def in_pass(self) -> bool:
        """Whether released parameters that are used now are gathered, rather than refused."""

    def assign(self, state: "OffloadedParameter", values: torch.Tensor) -> bool:
        """Replaces a released parameter's values where they are; False where a touch has to do."""

    def converting(self, state: "OffloadedParameter") -> None:
        """The parameter is about to get another storage; the address of the one that it has means nothing then."""

    def converted(self, state: "OffloadedParameter") -> None:
        """The parameter has another storage, of another dtype or device."""


class OffloadedParameter:
    """The state of one parameter.

    name: fully qualified once the model is known.
    remote: where it is on the servers, once it is there.
    version: of the bytes that are in the parameter's storage, or NOT_HERE.
    stale: whether they may be of older versions than that; see `OffloadConfig.max_staleness`.
    request: what the bytes were asked for with, while they are on their way or were not used yet.
    active: how many running forwards and `gathered` contexts use the parameter. While there are any the
        parameter is of its plain class and stays.
    saved: how many nodes of autograd graphs will need the parameter again.
    persistent: stays gathered between uses.
    by_rows: its module gathers the rows that it needs by itself.
    guarded_aliases: how many tensors share the storage whose every use is caught.
    contributions: gradients that were pushed in the running step.
    edition: how often the values were replaced otherwise than by a step, and a fingerprint of the latest.
    """

    def __init__(self, param: nn.Parameter, name: str, owner: Owner) -> None:
        self.name = name
        self.owner = owner
        self.shape = tuple(param.shape)
        self.numel = param.numel()
        self.remote: RemoteParameter | None = None
        self.request: Request | None = None
        self.active = 0
        self.saved = 0
        self.persistent = False
        self.by_rows = False
        self.contributions = 0
        self.edition: tuple[int, tuple[int, ...]] = (0, ())
        self.guarded_aliases = 0
        self.gradient_hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._plain_class = type(param)
        self._param = weakref.ref(param)
        self.version = NOT_HERE
        self.stale = False
        self.adopt_storage()
        setattr(param, _ATTRIBUTE, self)

    def __repr__(self) -> str:
        return f"OffloadedParameter({self.name!r}, shape={self.shape}, version={self.version}, active={self.active})"

    def __deepcopy__(self, memo: object) -> "OffloadedParameter":
        raise self.not_copyable()

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        raise self.not_copyable()

    def not_copyable(self) -> TypeError:
        return TypeError(
            f"parameter {self.name!r} is offloaded and cannot be copied or pickled; call trainer.remove(model) "
            "for a plain model first, or copy inside 'with trainer.gathered(...)' by clone()"
        )

    @property
    def param(self) -> nn.Parameter:
        param = self._param()
        if param is None:
            raise RuntimeError(f"parameter {self.name!r} does not exist any more")
        return param

    @property
    def model(self) -> "OffloadedModel":
        """The offloaded model that the parameter is of; not to be asked during construction."""
        return cast("OffloadedModel", self.owner)

    @property
    def module_name(self) -> str:
        """The fully qualified name of the module that the parameter is of."""
        return self.name.rpartition(".")[0]

    @property
    def resident_bytes(self) -> int:
        return self.storage.nbytes()

    def adopt_storage(self) -> None:
        """Notes the storage that the parameter has now: after it was made, moved or assigned to."""
        param = self.param
        with torch._C.DisableTorchFunctionSubclass():
            self.storage = param.untyped_storage()
            self.dtype = param.dtype
            self.device = param.device
        self.nbytes = self.numel * self.dtype.itemsize
        self.address: int = self.storage._cdata

    # ------------------------------------------------------------ bytes

    def allocate(self) -> None:
        """Gives the storage its bytes, with undefined content."""
        if self.storage.nbytes() != self.nbytes:
            self.owner.memory.fill(self.storage, self.nbytes)

    def free(self) -> None:
        """Gives the bytes back."""
        self.version = NOT_HERE
        self.owner.memory.empty(self.storage)

    def bytes_view(self) -> torch.Tensor:
        """The parameter's bytes as a 1-d uint8 tensor over the same storage."""
        return torch.empty(0, dtype=torch.uint8, device=self.device).set_(self.storage, 0, (self.nbytes,), (1,))

    def view(self, size: Sequence[int], stride: Sequence[int], offset: int, dtype: torch.dtype) -> torch.Tensor:
        """A tensor over the same storage that autograd knows nothing of."""
        return torch.empty(0, dtype=dtype, device=self.device).set_(self.storage, offset, size, stride)

    def whole(self) -> torch.Tensor:
        """The gathered parameter's values, in its shape, without its autograd identity."""
        return self.view(self.shape, _contiguous_stride(self.shape), 0, self.dtype)

    @property
    def replaced(self) -> bool:
        """Whether somebody assigned other memory to the parameter, through `.data`."""
        return bool(torch._C._storage_address(self.param) != self.address)  # type: ignore[attr-defined]

    @property
    def aliased(self) -> bool:
        """Whether somebody holds a view of the storage whose uses nothing catches."""
        return _uses(self.storage) > _OWN_USES + self.guarded_aliases

    def alias_is_gone(self, address: int) -> None:
        """A guarded tensor over the storage at `address` does not exist any more."""
        if address == self.address:
            self.guarded_aliases -= 1

    # ------------------------------------------------------------ dtype and device

    def convert(self, empty: Any) -> None:
        """Gives a released parameter a storage of its own without bytes, of that tensor's dtype and device."""
        self.owner.converting(self)
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            param = self.param
            param.data = torch.Tensor.as_subclass(empty, torch.Tensor)
        self.guarded_aliases = 0
        self.adopt_storage()
        self.version = NOT_HERE
        self.owner.converted(self)

    # ------------------------------------------------------------ class

    def activate(self) -> None:
        """Makes the parameter an ordinary one; its bytes have to be here."""
        self.active += 1
        if self.active == 1:
            self.param.__class__ = self._plain_class

    def deactivate(self) -> None:
        """Ends one use; after the last one every access is caught."""
        self.active -= 1
        if self.active == 0:
            if self.replaced:
                self.version = NOT_HERE
                with torch.no_grad():
                    self.param.data = self.whole()
            self.guard()

    def guard(self) -> None:
        """Has every access to the parameter go through `trainer.released`."""
        self.param.__class__ = released_class(self._plain_class)

    def detach_class(self) -> None:
        """Takes the guard off without counting a use."""
        self.param.__class__ = self._plain_class

    def detach(self) -> None:
        """Makes the parameter an ordinary one for good."""
        param = self.param
        self.detach_class()
        param.grad = None
        for hook in self.gradient_hooks:
            hook.remove()
        self.gradient_hooks.clear()
        if getattr(param, _ATTRIBUTE, None) is self:
            delattr(param, _ATTRIBUTE)


def offloaded(param: torch.Tensor) -> OffloadedParameter | None:
    """The state of a parameter that is offloaded, else None."""
    # Through __dict__: `getattr` on a missing name is many times as slow, and this is asked for every
    # parameter of every module call.
    state = param.__dict__.get(_ATTRIBUTE)
    return state if isinstance(state, OffloadedParameter) else None


def _contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    stride, result = 1, []
    for size in reversed(shape):
        result.append(stride)
        stride *= size
    return tuple(reversed(result))


def materialise(param: nn.Parameter) -> None:
    """Makes a parameter on the meta device one on the CPU, with undefined values, keeping its identity."""
    plain_class, attributes = type(param), dict(param.__dict__)
    real = nn.Parameter(torch.empty(param.shape, dtype=param.dtype, device="cpu"), param.requires_grad)
    # `param.data = ...` may not change the kind of tensor.
    torch.utils.swap_tensors(param, real)  # type: ignore[no-untyped-call]
    param.__class__ = plain_class
    param.__dict__.update(attributes)


def _uses(storage: torch.UntypedStorage) -> int:
    """How many tensors and storage objects share the memory."""
    count: int = torch._C._storage_Use_Count(storage._cdata)
    return count


def _own_uses() -> int:
    """What `_uses` says of a parameter of which nobody but its `OffloadedParameter` holds the storage."""
    param = nn.Parameter(torch.empty(1))
    storage = param.untyped_storage()
    return _uses(storage)


_OWN_USES = _own_uses()
