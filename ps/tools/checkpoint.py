"""A model in safetensors files: one file, or several with an index, as Hugging Face's tools write them."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ps.tools.errors import ToolError
from ps.tools.safetensors_header import TensorEntry, decode, header_bytes

_INDEX = ".index.json"
_FILE = ".safetensors"
_MAX_INDEX_BYTES = 1 << 28


@dataclass(frozen=True)
class CheckpointTensor:
    """A tensor of a checkpoint, and the file that has it."""

    file: Path
    entry: TensorEntry

    @property
    def name(self) -> str:
        return self.entry.name

    def read(self, first: int, count: int) -> torch.Tensor:
        """`count` elements from the flattened tensor's element `first`, shape (count,). Raises ToolError."""
        entry = self.entry
        assert entry.dtype is not None
        data = torch.empty(count * entry.dtype.itemsize, dtype=torch.uint8)
        _read_into(self.file, entry.start + first * entry.dtype.itemsize, data.numpy().data)
        # Any byte but 0 is true, and torch computes with the byte.
        return data != 0 if entry.dtype == torch.bool else data.view(entry.dtype)


def open_checkpoint(source: Path) -> list[CheckpointTensor]:
    """The tensors of a checkpoint in the order in which they are stored, every header checked.

    source: a safetensors file, an index (`*.index.json`), or a folder with one of either; where it has both,
        the index.
    Raises ToolError.
    """
    file = _file_in(source) if source.is_dir() else source
    if not file.name.endswith(_INDEX):
        return _tensors(file)
    weight_map = _read_index(file)
    found = [tensor for name in dict.fromkeys(weight_map.values()) for tensor in _tensors(file.parent / name)]
    in_files = {tensor.name: tensor.file.name for tensor in found}
    if len(in_files) != len(found):
        twice = next(tensor for tensor in found if in_files[tensor.name] != tensor.file.name)
        raise ToolError(
            f"tensor {twice.name!r} is both in {twice.file} and in {in_files[twice.name]}; keep one of them"
        )
    for name, expected in weight_map.items():
        if in_files.get(name) != expected:
            where = f"it is in {in_files[name]}" if name in in_files else "no file has it"
            raise ToolError(f"{file} says that tensor {name!r} is in {expected}, and {where}; get the files again")
    if unknown := in_files.keys() - weight_map.keys():
        name = min(unknown)
        raise ToolError(f"{file} does not list tensor {name!r} of {in_files[name]}; get the files again")
    return found


def _file_in(folder: Path) -> Path:
    # An export with --state has the optimizer's files beside the model's.
    files = [path for path in folder.iterdir() if not path.name.startswith(("optimizer.", "optimizer-"))]
    for suffix in (_FILE + _INDEX, _FILE):
        found = sorted(path for path in files if path.name.endswith(suffix))
        if len(found) > 1:
            names = ", ".join(path.name for path in found[:5])
            raise ToolError(f"{folder} has several checkpoints ({names}); name one of the files")
        if found:
            return found[0]
    raise ToolError(f"{folder} has neither *{_FILE} nor *{_FILE}{_INDEX}; name the checkpoint's file or folder")


def _tensors(file: Path) -> list[CheckpointTensor]:
    try:
        size = file.stat().st_size
    except OSError as error:
        raise _unreadable(file, error) from error
    beginning = bytearray(min(8, size))
    _read_into(file, 0, memoryview(beginning))
    header = bytearray(header_bytes(bytes(beginning), size, file))
    _read_into(file, len(beginning), memoryview(header))
    return [CheckpointTensor(file, entry) for entry in decode(bytes(header), size, file)]


def _read_index(file: Path) -> Mapping[str, str]:
    try:
        if file.stat().st_size > _MAX_INDEX_BYTES:
            raise ToolError(f"{file} is too large for an index; name a safetensors file, or its *{_INDEX}")
        document = json.loads(file.read_bytes())
    except OSError as error:
        raise _unreadable(file, error) from error
    except (ValueError, RecursionError) as error:
        raise ToolError(f"{file} is not JSON ({error}); get it again") from error
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ToolError(f"{file} is no index of a checkpoint: it has no weight_map; get it again")
    for tensor, name in weight_map.items():
        # Files of the same folder, nowhere else.
        if not isinstance(name, str) or not name.endswith(_FILE) or name != os.path.basename(name) or "\0" in name:
            raise ToolError(
                f"{file} is damaged: the file of tensor {tensor!r} is {str(name)[:200]!r}, and it has to be the name "
                f"of a *{_FILE} beside the index; get it again"
            )
    return weight_map


def _read_into(file: Path, offset: int, buffer: memoryview) -> None:
    """Fills a buffer from a file. Raises ToolError, also for a file that ends before."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while buffer:
                count = os.preadv(fd, [buffer], offset)
                if count == 0:
                    raise ToolError(f"{file} became shorter while it was read: it ends at byte {offset}; get it again")
                buffer, offset = buffer[count:], offset + count
        finally:
            os.close(fd)
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: OSError) -> ToolError:
    return ToolError(f"cannot read {file}: {error.strerror or error}; check the path, and that this user may read it")
