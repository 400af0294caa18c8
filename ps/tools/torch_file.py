"""What `torch.save` writes, for tensors that are not in memory.

torch itself writes the file, of tensors without values, and leaves room for their bytes
(`torch.serialization.skip_data`); the values are filled in as they come. It is a zip archive with one
uncompressed record a tensor, so in the end it gets the checksums of these.
"""

import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ps.store import durable
from ps.tools.crc32 import contribution
from ps.tools.tensor_file import TensorFile, bytes_of, write_at
from ps.tools.whole import WholeTensor

_LOCAL_HEADER = struct.Struct("<26xHH")  # lengths of the name and of the extra field
_DESCRIPTOR_CRC = 4  # after the data: a signature of four bytes, then the CRC
_CENTRAL_ENTRY = struct.Struct("<28xHHH12x")  # lengths of the name, the extra field and the comment
_CENTRAL_CRC = 16
_HAS_DESCRIPTOR = 0x08


class TorchFile:
    """A `Destination`: a file that `torch.load(path, weights_only=True)` reads.

    content: what to save, given the tensors that stand for those without values.
    """

    def __init__(
        self,
        path: Path,
        tensors: Sequence[WholeTensor],
        content: Callable[[dict[WholeTensor, torch.Tensor]], Any],
    ) -> None:
        self._path = path
        with FakeTensorMode():
            empty = {tensor: torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in tensors}
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(content(empty), path)
        # Records are numbered as `content` lists the tensors, which has to be as `tensors` does.
        self._records = dict(zip(tensors, _data_records(path), strict=True))
        self._file = TensorFile(path, {tensor: offset for tensor, (offset, _) in self._records.items()})
        self._checksums = dict.fromkeys(tensors, 0)

    def write(self, tensor: WholeTensor, chunk: int, values: torch.Tensor) -> None:
        data = bytes_of(values)
        end = tensor.first_element(chunk) * tensor.dtype.itemsize + len(data)
        self._checksums[tensor] ^= contribution(data, tensor.bytes - end)
        self._file.write(tensor, chunk, values)

    def finish(self) -> None:
        """Writes the checksums, without which torch reads the file, and other readers of archives do not."""
        checksums = {info.filename: self._checksums[tensor] for tensor, (_, info) in self._records.items()}
        for tensor, (offset, info) in self._records.items():
            if info.flag_bits & _HAS_DESCRIPTOR:
                crc = struct.pack("<I", self._checksums[tensor])
                write_at(self._path, offset + tensor.bytes + _DESCRIPTOR_CRC, crc)
        _write_directory(self._path, checksums)
        durable.sync(self._path)


def _data_records(path: Path) -> list[tuple[int, zipfile.ZipInfo]]:
    """Where the bytes of each record `data/<number>` begin in the file, by number, and its description."""
    found = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for info in archive.infolist():
            folder, _, number = info.filename.rpartition("/")
            if folder.endswith("/data") and number.isdigit():
                file.seek(info.header_offset)
                name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
                found[int(number)] = (info.header_offset + _LOCAL_HEADER.size + name_length + extra_length, info)
    return [found[number] for number in sorted(found)]


def _write_directory(path: Path, checksums: dict[str, int]) -> None:
    """Sets the checksums in the archive's directory, which follows the records."""
    with zipfile.ZipFile(path) as archive:
        position, entries = archive.start_dir, archive.infolist()
    with open(path, "r+b") as file:
        file.seek(position)
        directory = bytearray(file.read())
        place = 0
        for info in entries:
            if info.filename in checksums:
                struct.pack_into("<I", directory, place + _CENTRAL_CRC, checksums[info.filename])
            place += _CENTRAL_ENTRY.size + sum(_CENTRAL_ENTRY.unpack_from(directory, place))
        file.seek(position)
        file.write(directory)
