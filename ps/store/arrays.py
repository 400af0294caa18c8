"""Which zarr arrays make up a generation, and where in them each chunk lies.

The metadata documents are written here and not by zarr-python: they are the same bytes on every server,
whatever version of zarr runs there, and those of thousands of arrays cost milliseconds.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from protos.layout import ChunkGrid
from protos.names import ZARR_FILE, check_parameter_name
from ps.store.codecs import Encoding
from ps.store.contents import StateArray, StoredParameter

METADATA_FILE = ZARR_FILE

DIMENSIONS = "dimension_names"
"""The field of an array's metadata that earlier versions left out."""


@dataclass(frozen=True)
class ChunkedArray:
    """A zarr array that is cut along dim 0 only.

    path: relative to the generation's folder.
    chunk_shape: of every chunk; the last is padded to it in its file, as zarr's regular grid requires.
    codec: that its chunk files are compressed with; None if they are not.
    """

    path: str
    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    dtype: torch.dtype
    codec: str | None = None

    @property
    def chunk_bytes(self) -> int:
        """The size of each chunk in bytes, padding included: that of its file, if it is not compressed."""
        return math.prod(self.chunk_shape) * self.dtype.itemsize

    @property
    def encoding(self) -> Encoding | None:
        """How its chunk files are compressed, if they are."""
        return None if self.codec is None else Encoding(self.codec, self.chunk_bytes)

    def chunk_key(self, chunk: int) -> str:
        """The path of a chunk's file, relative to the generation's folder."""
        index = [chunk, *[0] * (len(self.shape) - 1)] if self.shape else []
        return "/".join([self.path, "c", *map(str, index)])

    def metadata(self) -> bytes:
        """The array's `zarr.json`."""
        compressed = [] if self.encoding is None else [self.encoding.metadata()]
        # One-byte types have no byte order to name; all others must name it, bfloat16 included, or
        # TensorStore refuses the array.
        little = {"configuration": {"endian": "little"}} if self.dtype.itemsize > 1 else {}
        return encode_document(
            {
                "zarr_format": 3,
                "node_type": "array",
                "shape": list(self.shape),
                "data_type": dtype_name(self.dtype),
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunk_shape)}},
                "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
                "fill_value": False if self.dtype == torch.bool else 0,
                "codecs": [{"name": "bytes", **little}, *compressed],
                # Of each array its own: xarray takes equal names for equal sizes, and opens nothing without names.
                DIMENSIONS: [f"{self.path.split('/')[-1]}.{dim}" for dim in range(len(self.shape))],
                "attributes": {},
            }
        )


def value_array(parameter: StoredParameter) -> ChunkedArray:
    """The array of a parameter's weights, or of a buffer's values."""
    folder = "weight" if parameter.kind == "parameter" else "buffer"
    return per_element_array(f"{folder}/{parameter.name}", parameter.shape, parameter.dtype, parameter.codec)


def state_array(parameter: StoredParameter, state: StateArray) -> ChunkedArray:
    """The array of one kind of optimizer state.

    State that is one number a parameter in torch (`step`) is one number a chunk here, in chunks of one:
    a parameter's chunks are on several servers and no two servers may write the same file.
    """
    path = f"{state.name}/{parameter.name}"
    dtype = parameter.dtype if state.dtype is None else state.dtype
    if state.per_element:
        return per_element_array(path, parameter.shape, dtype, state.codec)
    return ChunkedArray(path, (ChunkGrid.of(parameter.shape).num_chunks,), (1,), dtype)


def all_arrays(manifest: Sequence[StoredParameter], state_arrays: Mapping[str, StateArray]) -> Iterator[ChunkedArray]:
    """Every array of the model, whichever server holds its chunks."""
    for parameter in manifest:
        yield value_array(parameter)
        if parameter.has_state:
            for state in state_arrays.values():
                yield state_array(parameter, state)


def group_metadata(attributes: Mapping[str, object]) -> bytes:
    """The `zarr.json` of a group."""
    return encode_document({"zarr_format": 3, "node_type": "group", "attributes": attributes})


def encode_document(document: Mapping[str, object]) -> bytes:
    """JSON that is the same bytes for equal documents, in whatever order their keys were put in."""
    return json.dumps(document, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"


def check_names(manifest: Sequence[StoredParameter], state_names: Sequence[str]) -> None:
    """Raises ValueError for names that cannot be folders beside each other."""
    names = [parameter.name for parameter in manifest]
    for name in (*names, *state_names):
        check_parameter_name(name)
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"parameter {twice!r} is in the manifest twice")
    if taken := {"weight", "buffer"} & set(state_names):
        raise ValueError(f"optimizer state cannot be called {taken.pop()!r}: the group holds parameters")


_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
        torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip


def dtype_name(dtype: torch.dtype) -> str:
    """zarr's name of a dtype, which for all that can be stored is torch's; ValueError for others."""
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"{dtype} cannot be stored; the supported dtypes are {', '.join(_DTYPES)}")
    return name


def dtype_from_name(name: str) -> torch.dtype:
    """The inverse of `dtype_name`; ValueError for an unknown name."""
    if name not in _DTYPES:
        raise ValueError(f"dtype {name!r} is not one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def per_element_array(path: str, shape: tuple[int, ...], dtype: torch.dtype, codec: str | None = None) -> ChunkedArray:
    """An array with one element for each of a parameter of this shape, in that parameter's chunks."""
    # zarr has no empty chunks, so an empty dimension gets a chunk length of 1 (and no chunk).
    chunk_shape = tuple(max(1, n) for n in (ChunkGrid.of(shape).chunk_rows, *shape[1:])) if shape else ()
    return ChunkedArray(path, shape, chunk_shape, dtype, codec)
