"""One chunk: its weight, its optimizer state, its version, and what pulls are answered from."""

import math
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch

from protos.names import EMA
from protos.segment import Arena
from ps.errors import Conflict, VersionGone
from ps.home import IN_MEMORY, Forecast, Home
from ps.monitor import Patience
from ps.store import ChunkFile, ChunkState
from ps.tensor_bytes import joined
from ps.tier import Incoming, Lent, Part


class Chunk:
    """A run of whole rows of one parameter.

    shape: of the chunk as an array; dtype: as stored.
    version: how many optimizer steps the chunk has been through. It may be read without the lock, but
        whoever needs bytes of that version reads them under it.
    weight: without content until the chunk got its first.
    state: what the optimizer keeps, under torch's own names.
    stored: the files of a generation that have the present weight and state in them, or None. A file may be
        gone by now.
    copies: the weight in other dtypes, for pulls. One without content is of an earlier version.

    Tensors of parts may be used with a lease of them and `lock`, taken in this order.
    """

    def __init__(
        self,
        parameter: int,
        index: int,
        label: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        version: int,
        home: Home | None = None,
    ) -> None:
        self.parameter = parameter
        self.index = index
        self.label = label
        self.shape = shape
        self.dtype = dtype
        self.version = version
        self.elements = math.prod(shape)
        self.lock = threading.Lock()
        self.home = home or Home(IN_MEMORY, label)
        self.tier = self.home.tier
        # When the parts of a kind are used next: set by who knows.
        self.forecasts: dict[str, Forecast] = {}
        self.weight = self.new_part("weight", dtype)
        self.state: dict[str, Part] = {}
        self.copies: dict[torch.dtype, Part] = {}
        self.stored: ChunkState[ChunkFile] | None = None

    def new_part(
        self, folder: str, dtype: torch.dtype, *, kind: str = "weight", scalar: bool = False, derivable: bool = False
    ) -> Part:
        """A part without content, of the chunk's shape unless it is a scalar."""

        def forecast() -> float:
            known = self.forecasts.get(kind)
            return 0 if known is None else known()

        return self.home.part(folder, () if scalar else self.shape, dtype, forecast, derivable=derivable)

    def num_bytes(self, dtype: torch.dtype | None = None) -> int:
        """Bytes of the chunk in `dtype`; as stored if None."""
        return self.elements * (dtype or self.dtype).itemsize

    @property
    def row_elements(self) -> int:
        """Elements of one row."""
        return math.prod(self.shape[1:])

    @property
    def accumulation_dtype(self) -> torch.dtype:
        """Gradients add up in fp32, or fp64 for fp64 weights."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def has_weight(self) -> bool:
        return self.weight.filled

    def state_part(self, name: str, dtype: torch.dtype, *, scalar: bool) -> Part:
        """The part of one kind of state, made if there is none."""
        if name not in self.state:
            self.state[name] = self.new_part(name, dtype, kind="state", scalar=scalar)
        return self.state[name]

    @property
    def has_state(self) -> bool:
        """Whether the optimizer has stepped it."""
        return any(part.filled for name, part in self.state.items() if name != EMA)

    @property
    def stamp(self) -> int:
        """Grows with every change of what a commit has of the chunk."""
        return sum(part.stamp for part in (self.weight, *self.state.values()))

    @property
    def parts(self) -> list[Part]:
        return [self.weight, *self.state.values(), *self.copies.values()]

    @property
    def resident_bytes(self) -> int:
        return sum(part.resident_bytes for part in self.parts)

    def pulled(self, dtype: torch.dtype | None) -> Part | None:
        """What a pull in `dtype` is answered from, if it has been made for this version."""
        part = self.weight if dtype in (None, self.dtype) else self.copies.get(dtype)
        return part if part is not None and part.filled else None

    def read(
        self,
        version: int,
        dtype: torch.dtype,
        start: int,
        stop: int,
        patience: Patience | None = None,
        head: bytes = b"",
    ) -> bytes:
        """Bytes `start` to `stop` of the chunk in `dtype`, behind `head`. Raises VersionGone and Conflict."""
        with self._at(version, dtype, patience) as tensor:
            return joined(head, tensor, start, stop)

    def copy(
        self, version: int, dtype: torch.dtype, start: int, into: torch.Tensor, patience: Patience | None = None
    ) -> None:
        """Fills a 1-d uint8 tensor with the bytes of the chunk in `dtype` from `start` on. Raises as `read`."""
        with self._at(version, dtype, patience) as tensor:
            into.copy_(tensor.reshape(-1).view(torch.uint8)[start : start + into.numel()])

    @contextmanager
    def _at(self, version: int, dtype: torch.dtype, patience: Patience | None) -> Iterator[torch.Tensor]:
        """The chunk in `dtype`, in memory and unchanged until the block ends. Raises as `read`."""
        while True:
            with self.lock:
                self._check_version(version)
                source = self.pulled(dtype)
            if source is None:
                self._convert(version, dtype, patience)
                continue
            with self.tier.lease([source], what=source.label, patience=patience), self.lock:
                self._check_version(version)
                if self.pulled(dtype) is source:
                    yield source.tensor
                    return

    def read_part(
        self,
        part: Part,
        version: int,
        dtype: torch.dtype,
        start: int,
        stop: int,
        patience: Patience | None = None,
        head: bytes = b"",
    ) -> bytes:
        """As `read`, of a tensor of the chunk's state."""
        with self.tier.lease([part], what=part.label, patience=patience), self.lock:
            self._check_version(version)
            if dtype == part.dtype:
                return joined(head, part.tensor, start, stop)
            # What is asked for may begin or end within an element.
            first, end = start // dtype.itemsize, math.ceil(stop / dtype.itemsize)
            converted = byte_view(part.tensor.reshape(-1)[first:end].to(dtype))
            return b"".join((head, converted[start - first * dtype.itemsize : stop - first * dtype.itemsize]))

    def lend(
        self, version: int, dtype: torch.dtype, arena: Arena | None, patience: Patience | None = None
    ) -> Lent | None:
        """The chunk in `dtype`, to be read where it is until it is given back; None where it cannot be.

        arena: in which it has to be; None where this process reads it.
        Raises VersionGone, Conflict and MemoryError.
        """
        while True:
            with self.lock:
                self._check_version(version)
                if (source := self.pulled(dtype)) is not None:
                    return source.lend(arena)
            self._convert(version, dtype, patience, arena)

    def write(self, values: torch.Tensor) -> None:
        """Replaces the weight by `elements` values of any dtype; expects a lease of it, and the lock to be held."""
        self.weight.about_to_change(keep=False)
        self.weight.tensor.copy_(values.view(self.shape))
        self.weight.changed()
        self.stored = None
        self._empty_copies()

    def take_over(self, incoming: Incoming) -> None:
        """Replaces the weight by what came in, in its dtype; expects the lock to be held."""
        self.tier.adopt(self.weight, incoming)
        self.stored = None
        self._empty_copies()

    def holds(self, values: torch.Tensor) -> bool:
        """Whether the weight has these very bits already; expects a lease of it."""
        if not self.weight.filled:
            return False
        stored = values.to(self.dtype).view(self.shape)
        return byte_view(stored) == byte_view(self.weight.tensor)

    def advance(self, *, changed: bool, leased: Collection[Part] = ()) -> None:
        """On to the next version; expects the lock to be held.

        leased: parts in memory. Copies among them are made anew while the weight is here: made on demand,
        they would have it read again.
        """
        self.version += 1
        if not changed:
            return
        self.weight.changed()
        self.stored = None
        for copy in self.copies.values():
            if copy in leased:
                copy.about_to_change(keep=False)
                copy.tensor.copy_(self.weight.tensor)
                copy.changed()
            else:
                self.tier.empty(copy)

    def discard(self) -> None:
        """The chunk is of no more use."""
        self.tier.discard(self.parts, files=False)

    def _check_version(self, version: int) -> None:
        if self.version > version:
            raise VersionGone(f"version {version} of {self.label} is gone: it is at version {self.version}")
        if self.version < version or not self.weight.filled:
            raise Conflict(f"version {version} of {self.label} does not exist yet")

    def _convert(self, version: int, dtype: torch.dtype, patience: Patience | None, arena: Arena | None = None) -> None:
        """Makes the copy in `dtype`; arena: from which to take memory that it does not have yet."""
        with self.lock:
            copy = self.copies.get(dtype)
            if copy is None:
                name = str(dtype).removeprefix("torch.")
                copy = self.new_part(f"weight-{name}", dtype, kind="copy", derivable=True)
                self.copies[dtype] = copy
        with self.tier.lease([self.weight], [copy], what=copy.label, patience=patience), self.lock:
            self._check_version(version)
            if not copy.filled:
                copy.about_to_change(keep=False)
                if arena is not None:
                    copy.allocate_in(arena)
                copy.tensor.copy_(self.weight.tensor)
                copy.changed()

    def _empty_copies(self) -> None:
        for copy in self.copies.values():
            self.tier.empty(copy)


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, in place."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
