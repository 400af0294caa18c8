"""Reads one chunk file by itself: decoded, its checksum compared."""

import math
import os

import numpy as np
import numpy.typing as npt
import torch

from ps.store import checksum
from ps.store.contents import ChunkFile
from ps.store.errors import GO_BACK, DamagedError


def read_file(file: ChunkFile, remedy: str = GO_BACK) -> npt.NDArray[np.uint8]:
    """The bytes of a chunk, padding included. Raises DamagedError, naming the file."""
    try:
        data = file.path.read_bytes()
    except OSError as error:
        raise DamagedError(f"cannot read {file.path}: {reason_of(error)}; {remedy}") from error
    found = np.frombuffer(data, dtype=np.uint8)
    if file.crc32c is not None and (counted := checksum.extend(0, found)) != file.crc32c:
        raise DamagedError(
            f"{file.path} is damaged: its CRC32C is {counted:08x}, and it was written with {file.crc32c:08x}; {remedy}"
        )
    if file.encoding is None:
        return found
    try:
        return file.encoding.decode(data)
    except ValueError as error:
        raise DamagedError(f"{file.path} is damaged: it cannot be decompressed ({error}); {remedy}") from error


def read_tensor(file: ChunkFile, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor from a chunk's file. Raises DamagedError, naming the file."""
    data = read_file(file)
    size = math.prod(shape) * dtype.itemsize
    if len(data) < size:
        raise DamagedError(f"{file.path} is damaged: it has {len(data)} bytes, and {size} were written; {GO_BACK}")
    return torch.from_numpy(data[:size].copy()).view(dtype).view(shape)


def reason_of(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)
