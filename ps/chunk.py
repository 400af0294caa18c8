"""One chunk in memory: its weight, its optimizer state, its version, and what pulls are answered from."""

import math
import threading

import torch

from ps.errors import Conflict, VersionGone
from ps.store import ChunkFile, ChunkState


class Chunk:
    """A run of whole rows of one parameter.

    shape: of the chunk as an array; dtype: as stored.
    version: how many optimizer steps the chunk has been through. It may be read without the lock, but
        whoever needs bytes of that version reads them under it.
    weight: None until the chunk got its first. The tensor stays the same object ever after, so that
        state and views which refer to it stay true.
    state: what the optimizer keeps, under torch's own names.
    stored: the files of a generation that have the present weight and state in them, or None. A file may be
        gone by now.
    """

    def __init__(
        self, parameter: int, index: int, label: str, shape: tuple[int, ...], dtype: torch.dtype, version: int
    ) -> None:
        self.parameter = parameter
        self.index = index
        self.label = label
        self.shape = shape
        self.dtype = dtype
        self.version = version
        self.elements = math.prod(shape)
        self.lock = threading.Lock()
        self.weight: torch.Tensor | None = None
        self.state: dict[str, torch.Tensor] = {}
        self.stored: ChunkState[ChunkFile] | None = None
        # By wire dtype: the converted weight, and whether it is of the present version.
        self._copies: dict[torch.dtype, torch.Tensor] = {}
        self._views: dict[torch.dtype, memoryview] = {}

    def num_bytes(self, dtype: torch.dtype | None = None) -> int:
        """Bytes of the chunk in `dtype`; as stored if None."""
        return self.elements * (dtype or self.dtype).itemsize

    @property
    def accumulation_dtype(self) -> torch.dtype:
        """Gradients add up in fp32, or fp64 for fp64 weights."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def resident_bytes(self) -> int:
        tensors = [*self.state.values(), *self._copies.values()]
        if self.weight is not None:
            tensors.append(self.weight)
        return sum(t.nbytes for t in tensors)

    def read(self, version: int, dtype: torch.dtype, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of the chunk in `dtype`. Raises VersionGone and Conflict."""
        with self.lock:
            if self.version > version:
                raise VersionGone(f"version {version} of {self.label} is gone: it is at version {self.version}")
            if self.version < version or self.weight is None:
                raise Conflict(f"version {version} of {self.label} does not exist yet")
            view = self._views.get(dtype)
            if view is None:
                view = self._views[dtype] = byte_view(self._converted(self.weight, dtype))
            return bytes(view[start:stop])

    def write(self, values: torch.Tensor, *, adopt: bool = False) -> None:
        """Replaces the weight; expects the lock to be held.

        values: `elements` values of any dtype. With `adopt`, a tensor of the right dtype may become the
        weight itself if there is none yet.
        """
        if self.weight is not None:
            self.weight.copy_(values.view(self.shape))
        elif adopt and values.dtype == self.dtype:
            self.weight = values.view(self.shape)
        else:
            self.weight = torch.empty(self.shape, dtype=self.dtype)
            self.weight.copy_(values.view(self.shape))
        self._changed()

    def holds(self, values: torch.Tensor) -> bool:
        """Whether the weight has these very bits already."""
        if self.weight is None:
            return False
        stored = values.to(self.dtype).view(self.shape)
        return byte_view(stored) == byte_view(self.weight)

    def advance(self, *, changed: bool) -> None:
        """On to the next version; expects the lock to be held."""
        self.version += 1
        if changed:
            self._changed()

    def _changed(self) -> None:
        """Forgets what was derived from the former weight and state."""
        self._views.clear()
        self.stored = None

    def _converted(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if dtype == self.dtype:
            return weight
        copy = self._copies.get(dtype)
        if copy is None:
            copy = self._copies[dtype] = torch.empty(self.shape, dtype=dtype)
        copy.copy_(weight)
        return copy


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, in place."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
