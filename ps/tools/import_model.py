"""From a checkpoint to server folders that hold it as the first commit of a job."""

import json
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import translate
from pathlib import Path

import torch

from protos import MAX_MANIFEST_PARAMETERS
from protos.dtypes import storage_dtype
from protos.layout import ChunkGrid, place_all
from protos.names import check_job_name, check_parameter_name
from protos.sizes import format_bytes
from ps.store import ChunkState, CommitKey, GenerationHeader, StoredParameter
from ps.store.contents import ParameterKind
from ps.tools.checkpoint import CheckpointTensor, open_checkpoint
from ps.tools.errors import ToolError
from ps.tools.new_job import new_job
from ps.tools.progress import Advance, Progress, silent
from ps.tools.renaming import Rule, listed, rename


@dataclass(frozen=True)
class ImportOptions:
    """What becomes of a checkpoint's tensors.

    rules: see `rename`. skip: patterns of names in the checkpoint that are left out.
    frozen, buffers: patterns of names in the model: parameters that are not trained, and persistent buffers.
    dtype: in which the model has its floating-point parameters; None for that of the checkpoint. What is
        trained in 16 bits is kept as fp32 in either case.
    step: of the commit, from which training goes on.

    Patterns are those of `fnmatch`: `*`, `?` and `[...]`, of whole names.
    """

    job: str
    rules: tuple[Rule, ...] = ()
    skip: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    dtype: torch.dtype | None = None
    step: int = 0


@dataclass(frozen=True)
class Imported:
    """bytes: of weights and buffers, as they are kept."""

    key: CommitKey
    manifest: tuple[StoredParameter, ...]
    bytes: int


@dataclass(frozen=True)
class _Planned:
    tensor: CheckpointTensor
    parameter: StoredParameter


def import_model(
    source: Path, folders: Sequence[Path], options: ImportOptions, progress: Progress = silent
) -> Imported:
    """Writes a checkpoint into the data folders of `len(folders)` servers, the first of which is shard 0.

    The folders need not exist. Servers that are started with them have the job at `options.step`.
    Everything about the checkpoint is checked before anything is written; if writing fails, what was
    written is removed again. Killed half-way, no server starts with the folders until it was run again.

    Raises ToolError, StoreError for folders that cannot be written or are another shard's.
    """
    try:
        check_job_name(options.job)
    except ValueError as error:
        raise ToolError(str(error)) from error
    if len({folder.resolve() for folder in folders}) != len(folders):
        raise ToolError("a folder is named twice in --to: every server needs its own")
    plan = plan_import(open_checkpoint(source), options)
    manifest = tuple(planned.parameter for planned in plan)
    key = CommitKey(options.step, secrets.token_hex(8))
    metadata = json.dumps({"imported_from": source.absolute().name})
    with new_job(options.job, folders) as stores:
        _check_space(manifest, folders)
        total = sum(_bytes(parameter) for parameter in manifest)
        with progress(f"importing {source}", total) as advance:
            for shard, store in enumerate(stores):
                header = GenerationHeader(options.job, key, shard, len(stores), manifest, None, metadata)
                store.write(header, _chunks(plan, shard, len(stores), advance), {})
    return Imported(key, manifest, total)


def plan_import(tensors: Sequence[CheckpointTensor], options: ImportOptions) -> list[_Planned]:
    """What each tensor becomes, in the order of the checkpoint. Raises ToolError, listing what cannot be stored."""
    skipped = _matching("--skip", options.skip, [tensor.name for tensor in tensors])
    kept = [tensor for tensor in tensors if tensor.name not in skipped]
    if not kept:
        raise ToolError("the checkpoint has no tensor" + (" that is not skipped" if skipped else ""))
    if len(kept) > MAX_MANIFEST_PARAMETERS:
        raise ToolError(f"the checkpoint has {len(kept)} tensors; a job may have {MAX_MANIFEST_PARAMETERS}")
    new_names = rename([tensor.name for tensor in kept], options.rules)
    names = list(new_names.values())
    _check_names(names)
    frozen = _matching("--frozen", options.frozen, names)
    buffers = _matching("--buffers", options.buffers, names)
    if both := sorted(frozen & buffers):
        raise ToolError(f"{listed(both)} fit both --frozen and --buffers; a buffer is never trained: name it once")
    plan, unknown, untrainable = [], [], []
    for tensor in kept:
        name, dtype = new_names[tensor.name], tensor.entry.dtype
        if dtype is None:
            unknown.append(f"{tensor.name!r} ({tensor.entry.dtype_name})")
            continue
        is_buffer, trainable = name in buffers, name not in frozen and name not in buffers
        if trainable and not dtype.is_floating_point:
            untrainable.append(f"{name!r} ({tensor.entry.dtype_name})")
        if options.dtype is not None and dtype.is_floating_point and not is_buffer:
            dtype = options.dtype
        stored = storage_dtype(dtype, trainable=trainable)
        kind: ParameterKind = "buffer" if is_buffer else "parameter"
        plan.append(_Planned(tensor, StoredParameter(name, tensor.entry.shape, stored, kind, trainable)))
    if unknown:
        raise ToolError(
            f"zero-ps does not store {listed(unknown, quote=False)}, for the dtype; convert the checkpoint, or --skip "
            "them"
        )
    if untrainable:
        raise ToolError(
            f"only floating point can be trained, not {listed(untrainable, quote=False)}; say with --buffers or "
            "--frozen what they are. Other buffers of the model, such as running means, belong there too"
        )
    return plan


def _chunks(
    plan: Sequence[_Planned], shard: int, num_shards: int, advance: Advance
) -> Iterator[ChunkState[torch.Tensor]]:
    placement = place_all([planned.parameter.shape for planned in plan], num_shards)
    for index, (planned, shards) in enumerate(zip(plan, placement, strict=True)):
        parameter = planned.parameter
        grid = ChunkGrid.of(parameter.shape)
        for chunk, holder in enumerate(shards):
            if holder == shard:
                values = planned.tensor.read(grid.element_range(chunk)[0], grid.chunk_elements(chunk))
                weight = values.to(parameter.dtype).view(grid.chunk_shape(chunk))
                yield ChunkState(index, chunk, weight)
                advance(weight.nbytes)


def _matching(flag: str, patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    """The names that fit a pattern. Raises ToolError, listing them, for patterns that fit none."""
    found: set[str] = set()
    unused = []
    for pattern in patterns:
        fits = re.compile(translate(pattern)).match
        fitting = {name for name in names if fits(name)}
        found |= fitting
        if not fitting:
            unused.append(pattern)
    if unused:
        raise ToolError(f"no tensor fits {flag} {listed(unused)}; the names are {listed(names)}")
    return found


def _check_names(names: Sequence[str]) -> None:
    wrong = []
    for name in names:
        try:
            check_parameter_name(name)
            if name == "zarr.json":
                wrong.append(name)
        except ValueError:
            wrong.append(name)
    if wrong:
        raise ToolError(
            f"these names cannot be stored: {listed(name[:200] for name in wrong)}; a name begins with a letter, a "
            "digit or one underscore, and has neither slashes nor control characters and at most 200 characters: use "
            "--map"
        )


def _check_space(manifest: Sequence[StoredParameter], folders: Sequence[Path]) -> None:
    needed: dict[int, tuple[Path, int]] = {}
    for folder in folders:
        device = folder.stat().st_dev
        # Shards differ by less than a chunk.
        share = sum(_bytes(parameter) for parameter in manifest) // len(folders)
        needed[device] = (folder, needed.get(device, (folder, 0))[1] + share)
    for folder, share in needed.values():
        free = shutil.disk_usage(folder).free
        if share > free:
            raise ToolError(
                f"the disk of {folder} has room for {format_bytes(free)}, and its part of the model takes "
                f"{format_bytes(share)}; free some space, or choose other folders"
            )


def _bytes(parameter: StoredParameter) -> int:
    grid = ChunkGrid.of(parameter.shape)
    return grid.rows * grid.row_elements * parameter.dtype.itemsize
