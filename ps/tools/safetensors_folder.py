"""Tensors as safetensors files with an index, named and split as Hugging Face's tools do."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from ps.store import durable
from ps.tools.safetensors_header import NewTensor, encode
from ps.tools.tensor_file import TensorFile
from ps.tools.whole import WholeTensor


class SafetensorsFolder:
    """A `Destination`: `<base>.safetensors`, or `<base>-00001-of-00003.safetensors` and so on with
    `<base>.safetensors.index.json`.

    name: of a tensor in the files.
    max_shard_bytes: of the tensors in one file; a tensor that is larger has a file of its own.
    """

    def __init__(
        self,
        folder: Path,
        base: str,
        tensors: Sequence[WholeTensor],
        name: Callable[[WholeTensor], str],
        max_shard_bytes: int,
    ) -> None:
        self._folder = folder
        shards = list(_split(tensors, max_shard_bytes))
        self._files: list[TensorFile] = []
        self._file_of: dict[WholeTensor, TensorFile] = {}
        for number, shard in enumerate(shards, 1):
            suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            file = _begin(folder / f"{base}{suffix}.safetensors", shard, name)
            self._files.append(file)
            self._file_of.update(dict.fromkeys(shard, file))
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(tensor.bytes for tensor in tensors)},
                "weight_map": {name(tensor): file.path.name for tensor, file in self._file_of.items()},
            }
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            durable.write_file(folder / f"{base}.safetensors.index.json", text.encode())

    def write(self, tensor: WholeTensor, chunk: int, values: torch.Tensor) -> None:
        self._file_of[tensor].write(tensor, chunk, values)

    def finish(self) -> None:
        for file in self._files:
            file.finish()


def _begin(path: Path, tensors: Sequence[WholeTensor], name: Callable[[WholeTensor], str]) -> TensorFile:
    header, offsets = encode(NewTensor(name(tensor), tensor.dtype, tensor.shape) for tensor in tensors)
    with open(path, "xb") as file:
        file.write(header)
        os.truncate(file.fileno(), len(header) + sum(tensor.bytes for tensor in tensors))
    return TensorFile(path, {tensor: offsets[name(tensor)] for tensor in tensors})


def _split(tensors: Sequence[WholeTensor], max_shard_bytes: int) -> Iterator[list[WholeTensor]]:
    """As `split_torch_state_dict_into_shards` of huggingface_hub: in order, each file as full as it can be."""
    shard: list[WholeTensor] = []
    size = 0
    for tensor in tensors:
        if tensor.bytes > max_shard_bytes:
            yield [tensor]
            continue
        if size + tensor.bytes > max_shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.bytes
    if shard or not tensors:
        yield shard
