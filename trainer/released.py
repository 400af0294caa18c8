"""The class that a parameter has while it is released: every use of it is caught here.

`nn.Parameter` switches `__torch_function__` off; a subclass of it that has one is called before any torch
function sees the parameter. Swapping `__class__` on release and back on gather keeps the parameter's
identity and costs nothing while it is whole. No function of torch is patched.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from trainer.parameter import OffloadedParameter


def _metadata_functions() -> frozenset[object]:
    """What may be asked of a released parameter: it does not look at, move or alias any element."""
    tensor = torch.Tensor
    properties = (
        "shape", "dtype", "device", "layout", "ndim", "names", "itemsize", "nbytes", "requires_grad", "grad", "grad_fn",
        "is_leaf", "retains_grad", "output_nr", "_version", "_backward_hooks", "_post_accumulate_grad_hooks",
        "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_sparse_csr", "is_quantized", "is_mkldnn", "is_mps", "is_xpu",
        "is_nested", "is_ipu", "is_maia", "is_vulkan", "is_mtia", "is_xla", "name", "_base", "_cdata", "volatile",
    )  # fmt: skip
    methods = (
        "size", "dim", "numel", "nelement", "ndimension", "stride", "storage_offset", "element_size", "is_contiguous",
        "is_floating_point", "is_complex", "is_signed", "is_inference", "is_same_size", "is_pinned", "is_shared",
        "__len__", "__hash__", "requires_grad_", "register_hook", "register_post_accumulate_grad_hook", "get_device",
        "retain_grad", "has_names", "_is_view", "is_coalesced", "is_conj", "is_neg", "dim_order", "_is_zerotensor",
    )  # fmt: skip
    found: set[object] = {
        torch.is_floating_point, torch.is_complex, torch.numel, torch.is_tensor, torch.is_same_size, torch.is_storage,
        torch._has_compatible_shallow_copy_type, torch.is_inference,
    }  # fmt: skip
    for name in properties:
        descriptor = tensor.__dict__.get(name, getattr(torch._C.TensorBase, name, None))
        for accessor in ("__get__", "__set__", "__delete__"):
            if hasattr(descriptor, accessor):
                found.add(getattr(descriptor, accessor))
    found.update(getattr(tensor, name) for name in methods if hasattr(tensor, name))
    return frozenset(found)


_METADATA = _metadata_functions()


class Released:
    """Mixed into the class of a released parameter."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _METADATA:
            touched = [param._zero_ps for param in _released_in((args, kwargs))]
            for owner in dict.fromkeys(state.owner for state in touched):
                owner.touch([state for state in touched if state.owner is owner], func)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        state: OffloadedParameter = self._zero_ps  # type: ignore[attr-defined]
        return (
            f"Parameter {state.name!r} (released): shape={state.shape}, dtype={state.dtype}, "
            f"requires_grad={self.requires_grad}"  # type: ignore[attr-defined]
        )

    def __deepcopy__(self, memo: object) -> object:
        raise self._zero_ps.not_copyable()  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        raise self._zero_ps.not_copyable()  # type: ignore[attr-defined]


class ReleasedParameter(Released, nn.Parameter):
    """A plain `nn.Parameter` while it is released."""


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
