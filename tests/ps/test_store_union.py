"""The servers' folders, copied over each other, are one zarr group with the whole model."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from ps.store import JobStore, OptimizerGroup, OptimizerSpec
from ps.store.testing import Model
from ps.tools.resharding import reshard
from tests.ps.stored import (
    STATES,
    data_dirs,
    expected_arrays,
    manifest,
    read_with_tensorstore,
    unite,
    write_shards,
)

READ_ALL = """
import sys, warnings, numpy, zarr
warnings.simplefilter("ignore")  # about the shard files, which zarr does not know
assert not any(name.split(".")[0] in ("ps", "torch", "zarrs") for name in sys.modules)
group = zarr.open_group(sys.argv[1], mode="r")
arrays = {path: array[...] for path, array in group.members(max_depth=None) if isinstance(array, zarr.Array)}
numpy.savez(sys.argv[2], **{path.replace("/", "|"): numpy.asarray(array) for path, array in arrays.items()})
print(group.attrs["zero_ps"]["step"])
"""


@pytest.mark.parametrize("num_shards", [2, 3])
def test_plain_zarr_reads_the_whole_model_from_the_union(tmp_path, num_shards):
    model = Model(manifest(bf16=False), STATES)
    union = unite(write_shards(tmp_path, model, num_shards), tmp_path / "union")
    found_file = tmp_path / "found.npz"
    command = [sys.executable, "-c", READ_ALL, str(union), str(found_file)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "5"
    found = {name.replace("|", "/"): array for name, array in np.load(found_file).items()}
    expected = expected_arrays(model)
    assert found.keys() == expected.keys()
    for path, tensor in expected.items():
        assert found[path].dtype == tensor.numpy().dtype and found[path].shape == tensor.shape, path
        assert np.array_equal(found[path], tensor.numpy()), path


def test_servers_describe_the_model_in_the_same_bytes(tmp_path):
    paths = write_shards(tmp_path, Model(manifest(bf16=True), STATES), 3)
    documents = [{p.relative_to(path): p.read_bytes() for p in path.rglob("zarr.json")} for path in paths]
    assert documents[0] and documents[0] == documents[1] == documents[2]


def test_servers_have_no_other_file_in_common(tmp_path):
    paths = write_shards(tmp_path, Model(manifest(bf16=True), STATES), 3)
    own = [{p.relative_to(path) for p in path.rglob("*") if p.is_file() and p.name != "zarr.json"} for path in paths]
    assert not own[0] & own[1] and not own[0] & own[2] and not own[1] & own[2]


def test_metadata_is_strict_json(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    model = Model(manifest(bf16=True), STATES)
    optimizer = OptimizerSpec("SGD", (OptimizerGroup({"lr": float("nan")}, ()),))
    store = JobStore(tmp_path, "gpt", 0, 1)
    path = store.write(model.header(optimizer=optimizer), model.chunks(), STATES).path
    for file in path.rglob("*.json"):
        json.loads(file.read_text(), parse_constant=refuse)
    option = store.read_header(0).optimizer.groups[0].options["lr"]
    assert option != option


def test_zarr_python_reads_bfloat16_in_a_process_that_registered_it(tmp_path):
    import zarr

    model = Model(manifest(bf16=True), {})
    union = unite(write_shards(tmp_path, model, 2), tmp_path / "union")
    array = zarr.open_group(union, mode="r")["weight/frozen.weight"][...]
    found = torch.from_numpy(np.asarray(array).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(found, model.values[6])


@pytest.mark.parametrize("resharded", [False, True], ids=["committed", "resharded"])
def test_tensorstore_reads_every_array(tmp_path, resharded):
    model = Model(manifest(bf16=True), STATES)
    paths = write_shards(tmp_path, model, 2)
    if resharded:
        targets = data_dirs(tmp_path / "new", 3)
        reshard(data_dirs(tmp_path, 2), targets)
        paths = [folder / "gpt/generations/00000005" for folder in targets]
    union = unite(paths, tmp_path / "union")
    for path, tensor in expected_arrays(model).items():
        found = read_with_tensorstore(union, path)
        assert found.dtype.name == str(tensor.dtype).removeprefix("torch.")
        assert found.shape == tensor.shape, path
        assert found.tobytes() == tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), path
