"""The zarr data type `bfloat16` for zarr-python, which (3.1) has none of its own.

The name is that of the zarr extension registry, and TensorStore reads and writes it. zarrs 0.2 refuses
it, so zero-ps moves the bytes of chunks without naming their data type (`chunk_files.py`) and needs this
class only for whoever opens a generation with zarr-python.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeGuard

import numpy as np
from zarr.core.dtype.common import DataTypeValidationError, HasEndianness, HasItemSize
from zarr.dtype import ZDType, data_type_registry

try:
    from ml_dtypes import bfloat16 as _scalar_type
except ImportError:  # numpy has no bfloat16 of its own: arrays then show the 16 bits of each number
    _scalar_type = np.uint16

_NATIVE: np.dtype[Any] = np.dtype(_scalar_type)
_BITS_ONLY = _scalar_type is np.uint16


@dataclass(frozen=True, kw_only=True, slots=True)
class BFloat16(ZDType[np.dtype[Any], np.generic], HasEndianness, HasItemSize):
    """bfloat16, as `ml_dtypes.bfloat16` where that package is installed, else as uint16 bit patterns.

    `torch.from_numpy(array.view("int16")).view(torch.bfloat16)` is right for both.
    """

    dtype_cls: ClassVar[type[np.dtype[Any]]] = type(_NATIVE)
    _zarr_v3_name: ClassVar[Literal["bfloat16"]] = "bfloat16"

    @property
    def item_size(self) -> int:
        return 2

    @classmethod
    def from_native_dtype(cls, dtype: np.dtype[Any]) -> Self:
        # As bit patterns it must not claim uint16 arrays, which have a zarr data type of their own.
        if _BITS_ONLY or dtype != _NATIVE:
            raise DataTypeValidationError(f"{dtype} is not bfloat16")
        return cls()

    def to_native_dtype(self) -> np.dtype[Any]:
        return _NATIVE

    @classmethod
    def _from_json_v2(cls, data: object) -> Self:
        raise DataTypeValidationError("zarr v2 has no bfloat16")

    @classmethod
    def _from_json_v3(cls, data: object) -> Self:
        if data != cls._zarr_v3_name:
            raise DataTypeValidationError(f"{data!r} is not {cls._zarr_v3_name!r}")
        return cls()

    def to_json(self, zarr_format: Literal[2, 3]) -> Any:
        if zarr_format == 2:
            raise ValueError("zarr v2 has no bfloat16")
        return self._zarr_v3_name

    def _check_scalar(self, data: object) -> TypeGuard[float | np.generic]:
        return isinstance(data, (int, float, np.generic))

    def cast_scalar(self, data: object) -> np.generic:
        if not self._check_scalar(data):
            raise TypeError(f"{data!r} is not a number")
        scalar: np.generic = _NATIVE.type(data)
        return scalar

    def default_scalar(self) -> np.generic:
        return self.cast_scalar(0)

    def from_json_scalar(self, data: object, *, zarr_format: Literal[2, 3]) -> np.generic:
        # As bit patterns only 0 means the same in both readings, and 0 is the only fill value in use.
        if isinstance(data, bool) or not isinstance(data, (int, float)) or (_BITS_ONLY and data != 0):
            raise TypeError(f"fill value {data!r} is not supported for bfloat16")
        return self.cast_scalar(data)

    def to_json_scalar(self, data: object, *, zarr_format: Literal[2, 3]) -> float:
        return float(self.cast_scalar(data))


def register_bfloat16() -> None:
    """Lets zarr-python open arrays of data type `bfloat16` in this process. May be called again.

    A registration by another package is left alone.
    """
    if "bfloat16" not in data_type_registry.contents:
        data_type_registry.register("bfloat16", BFloat16)
