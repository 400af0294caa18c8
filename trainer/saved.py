"""What autograd saves for backward, when it is a parameter or a view of one.

torch calls a pair of hooks (`torch.autograd.graph.saved_tensors_hooks`) for every tensor that a node of
the graph saves and for every time that it takes it out again. A tensor on an offloaded parameter's storage
is replaced by a note of where in the parameter it is; taking it out gathers the parameter. So backward
finds each parameter it needs by whatever path the graph came about, and needs no knowledge of modules,
their outputs or the containers those come in.

The note also counts: while notes of a parameter exist a graph will need it, and when the last one is gone
nothing in backward can.

With hooks on, torch leaves out its check that a saved tensor was not changed in place, so it is done here.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from trainer.parameter import OffloadedParameter

_Hook = Callable[[Any], Any]

_by_storage: dict[int, "weakref.ref[OffloadedParameter]"] = {}


def register(state: OffloadedParameter) -> None:
    """Has saved tensors on the parameter's storage recognised."""
    address = state.address

    def forget(reference: "weakref.ref[OffloadedParameter]") -> None:
        # The address may be another parameter's by now.
        if _by_storage.get(address) is reference:
            del _by_storage[address]

    _by_storage[address] = weakref.ref(state, forget)


def unregister(state: OffloadedParameter) -> None:
    _by_storage.pop(state.address, None)


class SavedParameter:
    """A note in the graph: this part of that parameter, as it was at that version."""

    __slots__ = ("dtype", "edition", "offset", "size", "state", "stride", "version")

    def __init__(self, state: OffloadedParameter, tensor: torch.Tensor) -> None:
        self.state = state
        self.size: Sequence[int] = tensor.size()
        self.stride: Sequence[int] = tensor.stride()
        self.offset = int(tensor.storage_offset())
        self.dtype = tensor.dtype
        self.version = state.version
        self.edition = state.edition[0]
        state.saved += 1

    def __del__(self) -> None:
        self.state.saved -= 1
        if self.state.saved == 0:
            # May run in any thread at any time: only leaves word.
            self.state.model.unsaved(self.state)

    def restore(self) -> torch.Tensor:
        self.state.model.fetch_saved(self)
        return self.state.view(self.size, self.stride, self.offset, self.dtype)


def _state_of(tensor: torch.Tensor) -> OffloadedParameter | None:
    try:
        reference = _by_storage.get(torch._C._storage_address(tensor))  # type: ignore[attr-defined]
    except (RuntimeError, NotImplementedError):  # a kind of tensor that has no storage
        return None
    return None if reference is None else reference()


def _pack(tensor: torch.Tensor) -> object:
    state = _state_of(tensor)
    if state is not None:
        return SavedParameter(state, tensor)
    # A node that held its own output, grad_fn and all, would keep itself alive.
    if tensor.grad_fn is not None:
        tensor = tensor.detach()
    return tensor, (0 if tensor.is_inference() else tensor._version)


def _unpack(packed: Any) -> torch.Tensor:
    if type(packed) is SavedParameter:
        return packed.restore()
    tensor, version = packed
    if version != (0 if tensor.is_inference() else tensor._version):
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"[{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}, saved at version {version}"
        )
    result: torch.Tensor = tensor
    return result


class _Chained:
    """Hooks on top of somebody else's, as activation checkpointing's: parameters are ours, the rest theirs."""

    def __init__(self, pack: _Hook, unpack: _Hook) -> None:
        self._outer_pack = pack
        self._outer_unpack = unpack

    def pack(self, tensor: torch.Tensor) -> object:
        state = _state_of(tensor)
        return self._outer_pack(tensor) if state is None else SavedParameter(state, tensor)

    def unpack(self, packed: object) -> torch.Tensor:
        if type(packed) is SavedParameter:
            return packed.restore()
        result: torch.Tensor = self._outer_unpack(packed)
        return result


def push_hooks(*, always: bool = False) -> bool:
    """Has what autograd saves from here on go through this module, in this thread.

    Returns whether there is something to pop: hooks that are there already do, but for `always`, for
    those whose end may come after that of the ones below.
    """
    top: tuple[_Hook, _Hook] | None = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if top is None:
        torch._C._autograd._push_saved_tensors_default_hooks(_pack, _unpack)
        return True
    pack, unpack = top
    if pack is _pack or isinstance(getattr(pack, "__self__", None), _Chained):
        if always:
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)
        return always
    chained = _Chained(pack, unpack)
    torch._C._autograd._push_saved_tensors_default_hooks(chained.pack, chained.unpack)
    return True


def pop_hooks() -> None:
    torch._C._autograd._pop_saved_tensors_default_hooks()
