"""From a commit to files that other tools read."""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from protos.names import EMA
from protos.sizes import format_bytes
from ps.store import durable
from ps.store.contents import CommitKey
from ps.store.errors import FULL
from ps.store.generation_set import GenerationSet, find_generation
from ps.tools import optimizer_state
from ps.tools.errors import ToolError
from ps.tools.output import new_folder
from ps.tools.progress import Progress, silent
from ps.tools.safetensors_folder import SafetensorsFolder
from ps.tools.whole import Destination, WholeTensor, copy, state_of, values_of

_EXPORTED = re.compile(
    r"(model|optimizer)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|(model|ema)\.pt|optimizer\.pt|optimizer\.json"
)
_ZARR_KEY = "zero_ps_export"


@dataclass(frozen=True)
class ExportOptions:
    """format: `safetensors`, `torch` or `zarr`. out: the folder that is created.

    dtype: of all that is floating point in the model; None leaves each tensor its own.
    state: also what the optimizer keeps. max_shard_bytes: of the tensors in one safetensors file.
    """

    format: str
    out: Path
    dtype: torch.dtype | None = None
    state: bool = False
    max_shard_bytes: int = 5 * 10**9
    overwrite: bool = False


@dataclass(frozen=True)
class Exported:
    """What was written, and the names of the files in `out`."""

    job: str
    key: CommitKey
    tensors: int
    bytes: int
    files: tuple[str, ...]


def export(
    folders: Sequence[Path],
    options: ExportOptions,
    *,
    job: str | None = None,
    step: int | None = None,
    progress: Progress = silent,
) -> Exported:
    """Writes a commit that is complete over `folders` into `options.out`, which is there once all of it is.

    Raises ToolError, and StoreError for what cannot be read.
    """
    generation = find_generation(folders, job=job, step=step)
    foreign = _foreign if options.overwrite else None
    try:
        with new_folder(options.out, foreign=foreign) as folder:
            return _write(generation, options, folder, progress)
    except OSError as error:
        if error.errno in FULL:
            raise ToolError(
                f"the disk of {options.out.absolute().parent} is full; what was written is removed again, so free some "
                "space, or choose another --out"
            ) from error
        raise ToolError(
            f"cannot write {error.filename or options.out}: {error.strerror or error}; what was written is removed "
            "again"
        ) from error


def _write(generation: GenerationSet, options: ExportOptions, folder: Path, progress: Progress) -> Exported:
    values = values_of(generation, options.dtype)
    state = _exported_state(generation) if options.state else []
    total = sum(tensor.bytes for tensor in (*values, *state))
    _check_space(folder, total)
    places = list(_begin(generation, options, folder, values, state).items())
    with progress(f"exporting step {generation.key.step}", total) as advance:
        for written in copy(generation, places):
            advance(written)
    for destination in {id(destination): destination for _, destination in places}.values():
        destination.finish()
    files = tuple(sorted(entry.name for entry in folder.iterdir()))
    return Exported(generation.header.job, generation.key, len(places), total, files)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ToolError(
            f"the disk of {folder.parent} has room for {format_bytes(free)}, and the export takes "
            f"{format_bytes(needed)}; free some space, or choose another --out"
        )


def _begin(
    generation: GenerationSet,
    options: ExportOptions,
    folder: Path,
    values: Sequence[WholeTensor],
    state: Sequence[WholeTensor],
) -> dict[WholeTensor, Destination]:
    """Creates the files without the tensors' bytes, and says where each tensor belongs."""
    header = generation.header
    spec = header.optimizer if options.state else None
    described = spec and optimizer_state.description(spec, header.manifest)
    if options.format == "zarr":
        from ps.tools.zarr_group import ZarrGroup

        attributes = {"job": header.job, "step": header.key.step, "optimizer": described}
        group = ZarrGroup(folder, [*values, *state], {_ZARR_KEY: attributes})
        return dict.fromkeys([*values, *state], group)
    model: Destination
    optimizer: Destination
    if options.format == "torch":
        from ps.tools.torch_file import TorchFile

        model = TorchFile(folder / "model.pt", values, lambda found: {t.name: value for t, value in found.items()})
        if spec is None:
            return dict.fromkeys(values, model)
        # torch keeps the average of weights in a model, not in the optimizer.
        averages = [tensor for tensor in state if tensor.state == EMA]
        state = [tensor for tensor in state if tensor.state != EMA]
        optimizer = TorchFile(
            folder / "optimizer.pt", state, lambda found: optimizer_state.torch_state_dict(spec, found)
        )
        places: dict[WholeTensor, Destination] = {**dict.fromkeys(values, model), **dict.fromkeys(state, optimizer)}
        if averages:
            by_name = TorchFile(folder / "ema.pt", averages, lambda found: {t.name: v for t, v in found.items()})
            places |= dict.fromkeys(averages, by_name)
        return places
    else:
        model = SafetensorsFolder(folder, "model", values, lambda t: t.name, options.max_shard_bytes)
        if spec is None:
            return dict.fromkeys(values, model)
        optimizer = SafetensorsFolder(
            folder, "optimizer", state, lambda t: f"{t.state}/{t.name}", options.max_shard_bytes
        )
        durable.write_file(folder / "optimizer.json", (json.dumps(described, indent=2) + "\n").encode())
    return {**dict.fromkeys(values, model), **dict.fromkeys(state, optimizer)}


def _exported_state(generation: GenerationSet) -> list[WholeTensor]:
    optimizer = generation.header.optimizer
    if optimizer is None:
        raise ToolError(
            f"job {generation.header.job!r} has no optimizer at {generation.key}; leave out --state, or export a step "
            "that was trained"
        )
    stepped = {parameter for group in optimizer.groups for parameter in group.parameters}
    # What was in a group once and is in none now is nothing that torch could be given.
    return [tensor for tensor in state_of(generation) if tensor.parameter in stepped]


def _foreign(folder: Path) -> str | None:
    """Something in a folder that no export wrote."""
    try:
        document = json.loads((folder / "zarr.json").read_bytes())
        if _ZARR_KEY in document["attributes"]:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return next((name for name in sorted(p.name for p in folder.iterdir()) if not _EXPORTED.fullmatch(name)), None)
