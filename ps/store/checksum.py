"""CRC32C of chunk files: what a generation says that its files have."""

from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt
import torch

PIECE_BYTES = 1 << 20
"""The library holds Python's global lock while it counts; in pieces, nobody else waits long."""

_ZEROS = np.zeros(PIECE_BYTES, dtype=np.uint8)


def crc32c(data: torch.Tensor, padded_bytes: int | None = None) -> int:
    """Of the bytes of a 1-d uint8 tensor on the CPU, followed by as many zeros as make `padded_bytes`."""
    value = extend(0, data.numpy())
    missing = 0 if padded_bytes is None else padded_bytes - data.numel()
    for start in range(0, missing, PIECE_BYTES):
        value = extend(value, _ZEROS[: min(PIECE_BYTES, missing - start)])
    return value


def extend(value: int, data: npt.NDArray[np.uint8]) -> int:
    """The checksum of bytes whose beginning has the checksum `value` and whose rest is `data`."""
    for start in range(0, len(data), PIECE_BYTES):
        value = google_crc32c.extend(value, data[start : start + PIECE_BYTES])
    return value


def of_file(file: Path) -> int:
    """Of all bytes of a file. Raises OSError."""
    value = 0
    piece = np.empty(PIECE_BYTES, dtype=np.uint8)
    with file.open("rb", buffering=0) as opened:
        while size := opened.readinto(piece.data):
            value = extend(value, piece[:size])
    return value
