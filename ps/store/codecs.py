"""Compression of chunk files: zarr codecs, by the name that zarr's registry gives them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numcodecs import zstd

CODECS = ("zstd",)

_ZSTD_LEVEL = 1
"""Weights are mostly noise: higher levels take longer and save no more (measured)."""


@dataclass(frozen=True)
class Encoding:
    """How a compressed chunk file is read. decoded_bytes: of the chunk, padding included."""

    codec: str
    decoded_bytes: int

    def metadata(self) -> Mapping[str, object]:
        """The codec's entry in an array's `zarr.json`."""
        return {"name": self.codec, "configuration": {"level": _ZSTD_LEVEL, "checksum": False}}

    def encode(self, data: npt.NDArray[np.uint8]) -> bytes:
        """data: `decoded_bytes` bytes."""
        return bytes(zstd.compress(data, _ZSTD_LEVEL))

    def decode(self, data: bytes) -> npt.NDArray[np.uint8]:
        """Raises ValueError for what is no compressed chunk of this size."""
        # Of the right size: what the data says of its own is not to be believed.
        decoded = np.zeros(self.decoded_bytes, dtype=np.uint8)
        try:
            zstd.decompress(data, decoded)
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        return decoded


def check_codec(name: str) -> None:
    """Raises ValueError for a name that is no codec's."""
    if name not in CODECS:
        raise ValueError(f"{name!r} is not a codec: choose {' or '.join(CODECS)}")
