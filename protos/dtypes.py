"""Tensor dtypes on the wire and in storage."""

import torch

from protos import zero_ps_pb2 as pb

_TO_TORCH: dict[pb.DType, torch.dtype] = {
    pb.DTYPE_FLOAT64: torch.float64,
    pb.DTYPE_FLOAT32: torch.float32,
    pb.DTYPE_FLOAT16: torch.float16,
    pb.DTYPE_BFLOAT16: torch.bfloat16,
    pb.DTYPE_INT64: torch.int64,
    pb.DTYPE_INT32: torch.int32,
    pb.DTYPE_INT16: torch.int16,
    pb.DTYPE_INT8: torch.int8,
    pb.DTYPE_UINT8: torch.uint8,
    pb.DTYPE_BOOL: torch.bool,
}
_FROM_TORCH = {dtype: code for code, dtype in _TO_TORCH.items()}


def to_torch(code: pb.DType) -> torch.dtype:
    """The torch dtype of a wire code; ValueError for one that this version does not know."""
    try:
        return _TO_TORCH[code]
    except KeyError:
        raise ValueError(f"dtype code {code} is not one of {sorted(_TO_TORCH)}") from None


def from_torch(dtype: torch.dtype) -> pb.DType:
    """The wire code of a torch dtype; ValueError for one that cannot be stored."""
    try:
        return _FROM_TORCH[dtype]
    except KeyError:
        supported = ", ".join(str(d).removeprefix("torch.") for d in _FROM_TORCH)
        raise ValueError(f"{dtype} cannot be stored; the supported dtypes are {supported}") from None


def storage_dtype(dtype: torch.dtype, *, trainable: bool) -> torch.dtype:
    """The dtype in which servers keep a parameter.

    What is trained in 16 bits has an fp32 master; everything else keeps its own dtype.
    """
    if trainable and dtype in (torch.float16, torch.bfloat16):
        return torch.float32
    return dtype
