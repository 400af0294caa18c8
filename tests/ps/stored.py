"""A made-up model, committed into the data folders of several servers, without servers."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import tensorstore
import torch

from ps.store import DataDir, OptimizerGroup, OptimizerSpec, StateArray, StoredParameter
from ps.store.testing import ADAM_STATE, Model

ADAMW = OptimizerSpec("AdamW", (OptimizerGroup({"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}, (0, 1)),))
STATES = {**ADAM_STATE, "half": StateArray("half", torch.float16, per_element=True)}


def manifest(*, bf16: bool, small: bool = False) -> list[StoredParameter]:
    """All that is special. small: for chunks of the fixture `small_chunks`."""
    rows = 5 if small else 2600
    frozen = torch.bfloat16 if bf16 else torch.float16
    return [
        StoredParameter("layers.0.weight", (rows, 1031), torch.float32, "parameter", True),
        StoredParameter("layers.0.bias", (7,), torch.float32, "parameter", True),
        StoredParameter("layers.0.scale", (), torch.float32, "parameter", True),
        StoredParameter("layers.1.empty", (0, 5), torch.float32, "parameter", True),
        StoredParameter("layers.1.narrow", (5, 0), torch.float32, "parameter", True),
        StoredParameter("layers.1.double", (3, 2, 5), torch.float64, "parameter", True),
        StoredParameter("frozen.weight", (rows * 3 // 2, 601), frozen, "parameter", False),
        StoredParameter("mask", (3, 3), torch.bool, "buffer", False),
        StoredParameter("count", (), torch.int64, "buffer", False),
    ]


def small_manifest() -> list[StoredParameter]:
    """Two chunks of a matrix where chunks are small (fixture `small_chunks`), and little else."""
    return [
        StoredParameter("up.weight", (120, 31), torch.float32, "parameter", True),
        StoredParameter("up.bias", (7,), torch.float32, "parameter", True),
        StoredParameter("frozen", (5, 3), torch.bfloat16, "parameter", False),
        StoredParameter("count", (), torch.int64, "buffer", False),
    ]


def write_shards(
    folder: Path,
    model: Model,
    num_shards: int,
    *,
    step: int = 5,
    commit_id: str = "c0",
    job: str = "gpt",
    optimizer: OptimizerSpec | None = ADAMW,
) -> list[Path]:
    """Commits the model into the data folders `data_dirs(folder, num_shards)`; the folders of the generation."""
    paths = []
    for shard, data_dir in enumerate(data_dirs(folder, num_shards)):
        # Servers may hold a dict's keys in different orders; their files must not.
        order = reversed if shard % 2 else list
        spec = optimizer and replace(
            optimizer,
            groups=tuple(
                OptimizerGroup(dict(order(list(group.options.items()))), group.parameters) for group in optimizer.groups
            ),
        )
        states = dict(order(list(model.state_arrays.items())))
        header = model.header(
            shard, num_shards, step=step, commit_id=commit_id, job=job, optimizer=spec, metadata='{"a": 1}'
        )
        with DataDir(data_dir, shard, num_shards) as opened:
            written = opened.job_store(job).write(header, model.chunks(shard, num_shards), states)
        paths.append(written.path)
    return paths


def data_dirs(folder: Path, num_shards: int) -> list[Path]:
    return [folder / f"shard-{shard}" for shard in range(num_shards)]


def unite(paths: list[Path], target: Path) -> Path:
    for path in paths:
        shutil.copytree(path, target, dirs_exist_ok=True)
    return target


def read_with_tensorstore(group: Path, path: str) -> np.ndarray:
    """An array as TensorStore reads it, without anything of this project."""
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(group / path)}}
    return tensorstore.open(spec, read=True).result().read().result()


def expected_arrays(model: Model) -> dict[str, torch.Tensor]:
    arrays = {}
    for parameter, value, states in zip(model.manifest, model.values, model.states, strict=True):
        arrays[f"{'weight' if parameter.kind == 'parameter' else 'buffer'}/{parameter.name}"] = value
        arrays |= {f"{name}/{parameter.name}": tensor for name, tensor in states.items()}
    return arrays
