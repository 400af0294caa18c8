"""What a generation contains, as the rest of the server sees it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Literal, TypeVar

import torch

from protos.values import Option
from ps.store.codecs import Encoding

ParameterKind = Literal["parameter", "buffer"]


@dataclass(frozen=True)
class StoredParameter:
    """One entry of the manifest.

    name: fully qualified; tied parameters appear once.
    dtype: the dtype that is stored, which for what is trained in 16 bits is float32.
    codec: that its chunk files are compressed with; None if they are not.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: ParameterKind
    trainable: bool
    codec: str | None = None

    @property
    def has_state(self) -> bool:
        """Whether an optimizer may keep state for this parameter."""
        return self.kind == "parameter" and self.trainable


@dataclass(frozen=True)
class OptimizerGroup:
    """The options of one param group, and the indices of its parameters in the manifest."""

    options: Mapping[str, Option]
    parameters: tuple[int, ...]


@dataclass(frozen=True)
class OptimizerSpec:
    """A class of `torch.optim` by name, and its param groups.

    ema_decay: of the moving average of weights that is kept, or None.
    """

    class_name: str
    groups: tuple[OptimizerGroup, ...]
    ema_decay: float | None = None


@dataclass(frozen=True)
class StateArray:
    """One kind of state that an optimizer class keeps, described the same on every server.

    name: torch's own, such as `exp_avg` or `step`.
    dtype: None means the parameter's own, which is what `torch.zeros_like(parameter)` gives.
    per_element: True for a tensor of the parameter's shape, False for a 0-d one such as `step`.
    codec: that chunk files of per-element state are compressed with; None if they are not.
    """

    name: str
    dtype: torch.dtype | None
    per_element: bool
    codec: str | None = None


@dataclass(frozen=True)
class CommitKey:
    """Which commit a generation is. A step may be committed again with other content, under another id.

    commit_id: 1 to 64 of [0-9a-f], the same on every server.
    """

    step: int
    commit_id: str

    def __str__(self) -> str:
        return f"step {self.step}, commit {self.commit_id}"


@dataclass(frozen=True)
class GenerationHeader:
    """All of a generation but its tensors.

    metadata: the text of a JSON object, or "" for none; it is kept as it is.
    """

    job: str
    key: CommitKey
    shard: int
    num_shards: int
    manifest: tuple[StoredParameter, ...]
    optimizer: OptimizerSpec | None
    metadata: str


@dataclass(frozen=True)
class ChunkFile:
    """A complete file of one chunk of one array: the bytes that a generation would have in it, padding included.

    Generations link to such files, so nothing may write into one once it is stated here; see
    `ChunkFiles.write`, which never does.

    crc32c: of the whole file; None if it is not known.
    encoding: None if the file is not compressed.
    synced: whether the bytes are known to be on the disk.
    """

    path: Path
    crc32c: int | None = None
    synced: bool = False
    encoding: Encoding | None = None


ChunkValue = torch.Tensor | ChunkFile
"""What a chunk's weight, or one kind of its state, is written from."""

V_co = TypeVar("V_co", bound=ChunkValue, covariant=True)


@dataclass(frozen=True)
class ChunkState(Generic[V_co]):
    """One chunk: its weight and what the optimizer keeps for it, as tensors, as files, or some of each.

    parameter: index into the manifest.
    weight: as a tensor, shape `ChunkGrid.chunk_shape(chunk)`, dtype as in the manifest.
    state: by torch's own names, of the weight's shape or 0-d. Empty if the chunk was never stepped.
    awaited: whether somebody waits for it to be written, and rather to the page cache than to the disk.
    """

    parameter: int
    chunk: int
    weight: V_co
    state: Mapping[str, V_co] = field(default_factory=dict)
    awaited: bool = False


@dataclass(frozen=True)
class Written:
    """Which generation was asked for, where it is, and how many bytes of chunks were written for it now."""

    key: CommitKey
    path: Path
    bytes_written: int
