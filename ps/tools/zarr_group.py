"""Tensors as one plain zarr v3 group, in the layout of a generation's values."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from ps.store import durable
from ps.store.arrays import METADATA_FILE, ChunkedArray, group_metadata, value_array
from ps.store.contents import StoredParameter
from ps.tools.tensor_file import bytes_of
from ps.tools.whole import WholeTensor

SYNC_THREADS = 16
"""Files that wait for the disk at a time; a model has two for every parameter at least."""


class ZarrGroup:
    """A `Destination`: `weight/<name>`, `buffer/<name>` and `<state>/<name>` below a folder that exists.

    Every array has the whole tensor's shape, uncompressed; its chunks are those that servers keep.
    """

    def __init__(self, folder: Path, tensors: Sequence[WholeTensor], attributes: Mapping[str, object]) -> None:
        self._folder = folder
        self._arrays = {tensor: _array(tensor) for tensor in tensors}
        (folder / METADATA_FILE).write_bytes(group_metadata(attributes))
        for group in sorted({array.path.split("/")[0] for array in self._arrays.values()}):
            (folder / group).mkdir()
            (folder / group / METADATA_FILE).write_bytes(group_metadata({}))
        for array in self._arrays.values():
            (folder / array.path).mkdir()
            (folder / array.path / METADATA_FILE).write_bytes(array.metadata())

    def write(self, tensor: WholeTensor, chunk: int, values: torch.Tensor) -> None:
        array = self._arrays[tensor]
        data = bytes_of(values)
        path = self._folder / array.chunk_key(chunk)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "xb") as file:
            file.write(data)
            # The last chunk is padded to the length of the others, as zarr's regular grid requires.
            file.write(bytes(array.chunk_bytes - len(data)))

    def finish(self) -> None:
        with ThreadPoolExecutor(SYNC_THREADS, thread_name_prefix="export-sync") as executor:
            for _ in executor.map(durable.sync, self._folder.rglob("*")):
                pass


def _array(tensor: WholeTensor) -> ChunkedArray:
    values = value_array(StoredParameter(tensor.name, tensor.shape, tensor.dtype, tensor.kind, False))
    return values if tensor.state is None else replace(values, path=f"{tensor.state}/{tensor.name}")
