"""What a commit holds, as whole tensors, whose values come chunk by chunk."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from protos.layout import ChunkGrid
from ps.store.arrays import state_array
from ps.store.chunk_reader import ChunkReader
from ps.store.contents import ChunkState, ParameterKind, StateArray, StoredParameter
from ps.store.generation_set import GenerationSet
from ps.store.locate import REMEDY
from ps.tools.errors import ToolError


@dataclass(frozen=True)
class WholeTensor:
    """A parameter, a buffer, or one kind of a parameter's optimizer state, as it is written.

    parameter: index into the manifest. state: which kind; None for the value itself.
    shape: the parameter's, or () for state of one number such as `step`.
    """

    parameter: int
    state: str | None
    name: str
    kind: ParameterKind
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def first_element(self, chunk: int) -> int:
        """Where in the flattened tensor a chunk begins."""
        return ChunkGrid.of(self.shape).element_range(chunk)[0] if self.shape else 0


class Destination(Protocol):
    """Where whole tensors are written, chunk by chunk and in any order. Used by one thread."""

    def write(self, tensor: WholeTensor, chunk: int, values: torch.Tensor) -> None:
        """Takes a chunk's values in the tensor's dtype, contiguous. Raises OSError."""

    def finish(self) -> None:
        """Once every chunk is written: completes the files, and waits until they are on the disk."""


def values_of(generation: GenerationSet, dtype: torch.dtype | None) -> list[WholeTensor]:
    """Parameters and buffers in the order of the manifest.

    dtype: of all that is floating point; None leaves each its own.
    """
    return [
        WholeTensor(index, None, p.name, p.kind, p.shape, dtype if dtype and p.dtype.is_floating_point else p.dtype)
        for index, p in enumerate(generation.header.manifest)
    ]


def state_of(generation: GenerationSet) -> list[WholeTensor]:
    """What the optimizer keeps of each parameter, in the order of the manifest. Not that of parameters which
    it has never stepped. Raises ToolError if only some chunks of a parameter have it.
    """
    found = []
    for index, parameter in enumerate(generation.header.manifest):
        for state in generation.states.values() if parameter.has_state else ():
            if not _is_there(generation, parameter, state):
                continue
            shape = parameter.shape if state.per_element else ()
            dtype = parameter.dtype if state.dtype is None else state.dtype
            found.append(WholeTensor(index, state.name, parameter.name, parameter.kind, shape, dtype))
    return found


def _is_there(generation: GenerationSet, parameter: StoredParameter, state: StateArray) -> bool:
    array = state_array(parameter, state)
    chunks = range(ChunkGrid.of(parameter.shape).num_chunks)
    missing = [chunk for chunk in chunks if generation.part_with(array, chunk) is None]
    if missing and len(missing) < len(chunks):
        raise ToolError(
            f"chunk {missing[0]} of {array.path} of {generation.key} is missing, and others are there: the optimizer's "
            "state is not whole; leave out --state, or export another --step"
        )
    return not missing and bool(chunks)


def copy(generation: GenerationSet, places: Sequence[tuple[WholeTensor, Destination]]) -> Iterator[int]:
    """Reads what `places` names and writes each tensor to its destination, one server's chunks after another's.

    Yields, after each chunk, how many bytes of the results were written for it.
    In memory are the chunks that are being read ahead (`ChunkReader`), whatever the model's size.

    Raises ToolError, DamagedError and OSError.
    """
    wanted = {(tensor.parameter, tensor.state): (tensor, destination) for tensor, destination in places}
    numbers: dict[WholeTensor, torch.Tensor] = {}
    for chunk in _chunks(generation, with_state=any(tensor.state is not None for tensor, _ in places)):
        written = 0
        for state, values in ((None, chunk.weight), *chunk.state.items()):
            if (chunk.parameter, state) not in wanted:
                continue
            tensor, destination = wanted[chunk.parameter, state]
            if state is not None and not tensor.shape and values.dim() == 0:
                # One number a parameter in torch, and stored with each of its chunks.
                if tensor in numbers:
                    _check_equal(tensor, numbers[tensor], values)
                    continue
                numbers[tensor] = values.clone()
                destination.write(tensor, 0, values)
            else:
                destination.write(tensor, chunk.chunk, values.to(tensor.dtype))
            written += values.numel() * tensor.dtype.itemsize
        yield written


def _check_equal(tensor: WholeTensor, first: torch.Tensor, other: torch.Tensor) -> None:
    if not torch.equal(first, other):
        raise ToolError(
            f"the chunks of {tensor.name!r} differ in {tensor.state!r} ({first.item()} and {other.item()}), which "
            "torch keeps once for a parameter; leave out --state, or export another --step"
        )


def _chunks(generation: GenerationSet, *, with_state: bool) -> Iterator[ChunkState[torch.Tensor]]:
    states = dict(generation.states) if with_state else {}
    for shard in sorted({part.shard for part in generation.parts}):
        # Several, where a server has several disks.
        parts = {part.path: part.held for part in generation.parts if part.shard == shard}
        yield from ChunkReader(parts, replace(generation.header, shard=shard), states, REMEDY)
