"""A file in which every tensor's place is known before its values are: they are filled in as they come."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from ps.store import durable
from ps.tools.whole import WholeTensor


class TensorFile:
    """A `Destination`. The file exists, in its final size, with all but the tensors' bytes.

    offsets: where each tensor begins, in bytes from the file's beginning.
    """

    def __init__(self, path: Path, offsets: Mapping[WholeTensor, int]) -> None:
        self.path = path
        self._offsets = offsets

    def write(self, tensor: WholeTensor, chunk: int, values: torch.Tensor) -> None:
        write_at(
            self.path, self._offsets[tensor] + tensor.first_element(chunk) * tensor.dtype.itemsize, bytes_of(values)
        )

    def finish(self) -> None:
        durable.sync(self.path)


def bytes_of(values: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor, in place where it is contiguous."""
    return values.contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_at(path: Path, offset: int, data: memoryview | bytes) -> None:
    """Writes into a file that exists. Raises OSError."""
    # Opened for each write: a model may have more files than a process may have open.
    file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        view = memoryview(data)
        while view:
            count = os.pwrite(file, view, offset)
            view, offset = view[count:], offset + count
    finally:
        os.close(file)
