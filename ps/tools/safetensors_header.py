"""The header of a safetensors file: which tensors it has and where their bytes are.

Eight bytes with the header's length, the header as JSON, then the tensors' bytes without gaps.
https://github.com/huggingface/safetensors#format describes it. The `safetensors` package can neither write
a file piece by piece nor read rows of a tensor without mapping the file, so this is done here.
"""

import json
import math
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

import torch

from ps.tools.errors import ToolError

MAX_HEADER_BYTES = 100_000_000
"""The limit of the `safetensors` package; a length beyond it is no header but something else's bytes."""

_LENGTH = struct.Struct("<Q")
_MAX_ELEMENTS = 1 << 48
_MAX_DIMENSIONS = 64
_METADATA = "__metadata__"

# In the order in which the `safetensors` package lays tensors out: a file that is written here is the same,
# byte for byte, and every tensor is aligned to its own element size.
_DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(_DTYPES.values())}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a file.

    dtype_name: as in the file. dtype: None for one that zero-ps has no use for, such as F8_E4M3.
    start, stop: of its bytes in the file, in bytes from the file's beginning.
    """

    name: str
    dtype_name: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class NewTensor:
    """A tensor that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def encode(tensors: Iterable[NewTensor]) -> tuple[bytes, dict[str, int]]:
    """The bytes before the tensors' own, and where each tensor's begin, in bytes from the file's beginning.

    Raises ToolError for a header that readers would refuse as too long.
    """
    entries: dict[str, object] = {_METADATA: {"format": "pt"}}
    offsets = {}
    position = 0
    for tensor in sorted(tensors, key=lambda t: (_RANKS[t.dtype], t.name.encode())):
        stop = position + tensor.bytes
        entries[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, stop],
        }
        offsets[tensor.name] = position
        position = stop
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ToolError(
            f"{len(offsets)} tensors need a header of {len(text)} bytes, and readers of safetensors accept "
            f"{MAX_HEADER_BYTES}; choose a smaller --max-shard-size"
        )
    begin = _LENGTH.size + len(text)
    return _LENGTH.pack(len(text)) + text, {name: begin + offset for name, offset in offsets.items()}


def header_bytes(beginning: bytes, file_bytes: int, file: object) -> int:
    """How many bytes the header has, by the first eight of a file of `file_bytes`. Raises ToolError."""
    if len(beginning) < _LENGTH.size:
        raise ToolError(f"{file} is not a safetensors file: it has {file_bytes} bytes, and its header takes more")
    (length,) = _LENGTH.unpack_from(beginning)
    if length > MAX_HEADER_BYTES:
        raise ToolError(
            f"{file} is not a safetensors file: its first 8 bytes say that the header has {length} bytes, and "
            f"{MAX_HEADER_BYTES} is the most that one may have"
        )
    if length > file_bytes - _LENGTH.size:
        raise ToolError(
            f"{file} is cut off within its header: that has {length} bytes, and the file {file_bytes}; get it again"
        )
    return int(length)


def decode(header: bytes, file_bytes: int, file: object) -> list[TensorEntry]:
    """The tensors of a file, in the order of their bytes.

    header: the JSON after the first eight bytes. file_bytes: the size of the whole file.
    Raises ToolError, naming file and tensor, for whatever is not a header of this very file: sizes that do
    not fit shape and dtype, bytes outside the file or of two tensors or of none.
    """
    document = _parse(header, file)
    begin = _LENGTH.size + len(header)
    entries = [_entry(name, value, begin, file) for name, value in document.items() if name != _METADATA]
    # Empty tensors first of those that begin at one place: they overlap nothing.
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    position = begin
    for entry in entries:
        if entry.stop > file_bytes:
            raise ToolError(
                f"{file} is cut off: tensor {entry.name!r} ends at byte {entry.stop}, and the file has {file_bytes} "
                "bytes; get it again"
            )
        if entry.start != position:
            what = "overlaps another tensor" if entry.start < position else f"leaves {entry.start - position} bytes out"
            _refuse(file, entry.name, f"{what}: it begins at byte {entry.start}, expected {position}")
        position = entry.stop
    if position != file_bytes:
        raise ToolError(
            f"{file} is damaged: its tensors end at byte {position}, and the file has {file_bytes} bytes; get it again"
        )
    return entries


def _parse(header: bytes, file: object) -> dict[str, object]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise ToolError(f"{file} is damaged: its header has {twice[:200]!r} twice; get it again")
        return found

    try:
        document = json.loads(header.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ToolError(f"{file} is not a safetensors file: its header is not JSON ({error})") from error
    if not isinstance(document, dict):
        raise ToolError(f"{file} is not a safetensors file: its header is a {type(document).__name__}, not an object")
    return document


def _entry(name: str, value: object, begin: int, file: object) -> TensorEntry:
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        _refuse(file, name, "is not described by dtype, shape and data_offsets")
    dtype_name, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype_name, str):
        _refuse(file, name, f"has dtype {_short(dtype_name)}, which is no name")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        _refuse(file, name, f"has shape {_short(shape)}, which is none")
    if math.prod(max(1, n) for n in shape) > _MAX_ELEMENTS:
        _refuse(file, name, f"has shape {_short(shape)}, which is too large")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse(file, name, f"has data_offsets {_short(offsets)}, which are none")
    dtype = _DTYPES.get(dtype_name)
    start, stop = offsets
    if dtype is not None and stop - start != math.prod(shape) * dtype.itemsize:
        _refuse(
            file,
            name,
            f"has {stop - start} bytes, and shape {shape} in {dtype_name} takes {math.prod(shape) * dtype.itemsize}",
        )
    return TensorEntry(name, dtype_name, dtype, tuple(shape), begin + start, begin + stop)


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 62 for n in value
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _refuse(file: object, name: str, why: str) -> NoReturn:
    raise ToolError(f"{file} is damaged: tensor {name[:200]!r} {why}; get it again")
