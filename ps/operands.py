"""What an update lends torch of a chunk: all of it, or only the rows that have a gradient."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch

from protos.layout import ALIGN_ELEMENTS
from protos.names import EMA
from ps.chunk import Chunk


class Operands(ABC):
    """weight, gradient: of one shape, that of the state too which is kept for each element."""

    weight: torch.Tensor
    gradient: torch.Tensor
    state: dict[str, torch.Tensor]

    @abstractmethod
    def keep(self, state: Mapping[str, object]) -> None:
        """Has the chunk's parts hold what an update made of its weight and state."""


class Whole(Operands):
    """The chunk's own tensors."""

    def __init__(self, chunk: Chunk, gradient: torch.Tensor) -> None:
        self._chunk = chunk
        self.weight, self.gradient = chunk.weight.tensor, gradient
        self.state = {name: part.tensor for name, part in chunk.state.items() if part.filled and name != EMA}

    def keep(self, state: Mapping[str, object]) -> None:
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                scalar = value.shape != self._chunk.shape
                self._chunk.state_part(name, value.dtype, scalar=scalar).hold(value)


class SomeRows(Operands):
    """Copies of some rows, flat; the others keep their weight and state, as under `torch.optim.SparseAdam`.

    They end with zeros, at least one, so that they are a multiple of the elements that vectorised kernels take at
    once: which of them treats an element does not depend on what other rows the chunk has. And state that an update
    makes of zeros is what rows have that were never touched.
    """

    def __init__(self, chunk: Chunk, gradient: torch.Tensor, rows: torch.Tensor) -> None:
        """rows: their numbers in the chunk, each once."""
        self._chunk = chunk
        self._rows = rows
        self._elements = len(rows) * chunk.row_elements
        self.weight, self.gradient = self._gathered(chunk.weight.tensor), self._gathered(gradient)
        self.state = {
            name: self._gathered(part.tensor) if part.shape == chunk.shape else part.tensor
            for name, part in chunk.state.items()
            if part.filled and name != EMA
        }

    @staticmethod
    def num_elements(chunk: Chunk, rows: int) -> int:
        """Of each of the copies."""
        return (rows * chunk.row_elements // ALIGN_ELEMENTS + 1) * ALIGN_ELEMENTS

    def keep(self, state: Mapping[str, object]) -> None:
        chunk = self._chunk
        self._scatter(self.weight, chunk.weight.tensor)
        for name, value in state.items():
            if not isinstance(value, torch.Tensor):
                continue
            part = chunk.state_part(name, value.dtype, scalar=value.shape != self.weight.shape)
            if value.shape != self.weight.shape:
                part.hold(value)
                continue
            if not part.filled:
                part.tensor.fill_(value[-1])
            self._scatter(value, part.tensor)
            part.changed()

    def _gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.new_zeros(self.num_elements(self._chunk, len(self._rows)))
        torch.index_select(self._by_row(tensor), 0, self._rows, out=self._by_row(copy[: self._elements]))
        return copy

    def _scatter(self, copy: torch.Tensor, tensor: torch.Tensor) -> None:
        self._by_row(tensor).index_copy_(0, self._rows, self._by_row(copy[: self._elements]))

    def _by_row(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(-1, self._chunk.row_elements)
