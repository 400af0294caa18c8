"""The class that a parameter has while it is released: every use of it is caught here.

`nn.Parameter` switches `__torch_function__` off; a subclass of it that has one is called before any torch
function sees the parameter. Swapping `__class__` on release and back on gather keeps the parameter's
identity and costs nothing while it is whole. No function of torch is patched.

Three kinds of calls need no values and are answered without fetching: questions about shape, dtype and the
like; `detach`, which `state_dict` uses, and which gives an alias that is guarded in the same way; and
conversions to another dtype or device, which `Module.to` uses.
"""

import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trainer.errors import ReleasedParameterError
from trainer.memory import empty_of

if TYPE_CHECKING:
    from trainer.parameter import OffloadedParameter


def _metadata_functions() -> frozenset[object]:
    """What may be asked of a released parameter: it does not look at, move or alias any element."""
    tensor = torch.Tensor
    properties = (
        "shape", "dtype", "device", "layout", "ndim", "names", "itemsize", "nbytes", "requires_grad", "grad", "grad_fn",
        "is_leaf", "retains_grad", "output_nr", "_version", "_backward_hooks", "_post_accumulate_grad_hooks", "_base",
        "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_sparse_csr", "is_quantized", "is_mkldnn", "is_mps", "is_xpu",
        "is_nested", "is_ipu", "is_maia", "is_vulkan", "is_mtia", "is_xla", "name", "volatile",
    )  # fmt: skip
    methods = (
        "size", "dim", "numel", "nelement", "ndimension", "stride", "storage_offset", "element_size", "is_contiguous",
        "is_floating_point", "is_complex", "is_signed", "is_inference", "is_same_size", "is_pinned", "is_shared",
        "__len__", "__hash__", "requires_grad_", "register_hook", "register_post_accumulate_grad_hook", "get_device",
        "retain_grad", "has_names", "_is_view", "is_coalesced", "is_conj", "is_neg", "dim_order", "_is_zerotensor",
        "untyped_storage",
    )  # fmt: skip
    found: set[object] = {
        torch.is_floating_point, torch.is_complex, torch.numel, torch.is_tensor, torch.is_same_size, torch.is_storage,
        torch._has_compatible_shallow_copy_type, torch.is_inference, torch.autograd.grad, torch.autograd.backward,
        torch.Tensor.backward,
    }  # fmt: skip
    for name in properties:
        descriptor = tensor.__dict__.get(name, getattr(torch._C.TensorBase, name, None))
        for accessor in ("__get__", "__set__", "__delete__"):
            if hasattr(descriptor, accessor):
                found.add(getattr(descriptor, accessor))
    found.update(getattr(tensor, name) for name in methods if hasattr(tensor, name))
    return frozenset(found)


METADATA = _metadata_functions()
"""Functions of torch that need no element of their arguments."""

CONVERSIONS = frozenset(
    getattr(torch.Tensor, name)
    for name in ("to", "type", "cpu", "cuda", "float", "double", "half", "bfloat16", "type_as")
)
"""Functions that give the same values in another dtype or on another device."""

SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]


class Released:
    """Mixed into the class of a released parameter, and of what stands for one."""

    _zero_ps: "OffloadedParameter"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in METADATA:
            for tensor in _released_in((args, kwargs)):
                _refuse_stand_in(tensor, func)
            released = [tensor for tensor in _released_in((args, kwargs)) if not tensor._zero_ps.active]
            # All of one parameter: it, and what stands for it.
            if released and args and args[0] is released[0] and len({id(t._zero_ps) for t in released}) == 1:
                answer = _without_values(released[0], func, args[1:], kwargs)
                if answer is not None:
                    return answer
            states = [tensor._zero_ps for tensor in released]
            for owner in dict.fromkeys(state.owner for state in states):
                owner.touch([state for state in states if state.owner is owner], func)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    def as_subclass(self, cls: type) -> Any:
        """torch does not ask before it makes an alias here."""
        if not self._zero_ps.active:
            self._zero_ps.owner.touch([self._zero_ps], torch.Tensor.as_subclass)
        return torch.Tensor.as_subclass(self, cls)  # type: ignore[arg-type]

    def __repr__(self, *, tensor_contents: object = None) -> str:
        state = self._zero_ps
        if state.active:
            with torch._C.DisableTorchFunctionSubclass():
                return str(torch.Tensor.__repr__(self))  # type: ignore[arg-type,no-untyped-call]
        requires_grad = self.requires_grad  # type: ignore[attr-defined]
        return (
            f"{type(self).__name__}({state.name!r}, shape={state.shape}, dtype={state.dtype}, device={state.device}, "
            f"requires_grad={requires_grad})"
        )

    def __deepcopy__(self, memo: object) -> object:
        raise self._zero_ps.not_copyable()

    def __reduce_ex__(self, protocol: object) -> Any:
        raise self._zero_ps.not_copyable()


class ReleasedParameter(Released, nn.Parameter):  # type: ignore[misc]
    """A plain `nn.Parameter` while it is released."""


class ReleasedTensor(Released, torch.Tensor):  # type: ignore[misc]
    """Stands for a released parameter, as in a state dict: shares its memory, and with it its state."""


_classes: dict[type, type] = {nn.Parameter: ReleasedParameter}


def released_class(plain: type) -> type:
    """The class for a released parameter whose own class is `plain` (a subclass of `nn.Parameter`)."""
    found = _classes.get(plain)
    if found is None:
        found = _classes[plain] = type(f"Released{plain.__name__}", (Released, plain), {})
    return found


def _released_in(value: object) -> Iterator[Any]:
    """The released parameters in the arguments of a call, in containers too."""
    if isinstance(value, Released):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _released_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _released_in(item)


def _without_values(tensor: Any, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of calls that need no values, or None when `func` does."""
    state: OffloadedParameter = tensor._zero_ps
    if func is torch.Tensor.detach:
        with torch._C.DisableTorchFunctionSubclass():
            return _guarded(tensor.detach(), state)
    if func in CONVERSIONS and not state.owner.in_pass():
        # What the conversion would give, without any element to convert.
        probe = func(torch.empty([0] * len(state.shape), dtype=state.dtype, device=state.device), *args, **kwargs)
        if not isinstance(probe, torch.Tensor):
            return None
        if probe.dtype == state.dtype and probe.device == state.device and not kwargs.get("copy"):
            return tensor
        return _guarded(empty_of(state.shape, probe.dtype, probe.device), state)
    if func == SET_DATA and isinstance(args[0], Released):
        if args[0] is not tensor:
            state.convert(args[0])
        return True
    if func is torch.Tensor.copy_ and not isinstance(args[0], Released) and state.owner.assign(state, args[0]):
        return tensor
    return None


def _refuse_stand_in(tensor: Any, func: Callable[..., Any]) -> None:
    """Raises for a converted released parameter, which never has values: it is for `Module.to` only."""
    if type(tensor) is not ReleasedTensor or func == SET_DATA or func in CONVERSIONS:
        return
    state: OffloadedParameter = tensor._zero_ps
    with torch._C.DisableTorchFunctionSubclass():
        address = torch._C._storage_address(tensor)  # type: ignore[attr-defined]
    if address != state.address:
        raise ReleasedParameterError(
            f"this is parameter {state.name!r} as it was released, converted to {tensor.dtype}: it has no values for "
            f"{getattr(func, '__name__', func)!s}; convert inside 'with trainer.gathered(param):'"
        )


def _guarded(plain: torch.Tensor, state: "OffloadedParameter") -> ReleasedTensor:
    """Makes a tensor without memory, or that shares the parameter's, one whose uses are caught."""
    address = plain.untyped_storage()._cdata
    # Not by as_subclass: its result is a view that holds on to the tensor it was made from.
    tensor: ReleasedTensor = torch.Tensor._make_subclass(ReleasedTensor, plain)
    tensor._zero_ps = state
    if address == state.address:
        state.guarded_aliases += 1
        weakref.finalize(tensor, state.alias_is_gone, address)
    return tensor
