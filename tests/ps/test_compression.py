"""Commits whose chunk files are compressed: any reader and every tool sees what was committed."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

import ps
from ps.store import ChunkState, DamagedError, JobStore
from ps.store.testing import ADAM_STATE, Model
from ps.tools.export_model import ExportOptions, export
from ps.tools.resharding import reshard
from ps.tools.verification import verify
from tests.ps.exported import values
from tests.ps.stored import STATES, data_dirs, expected_arrays, manifest, read_with_tensorstore, unite, write_shards

pytestmark = pytest.mark.usefixtures("small_chunks")


def compressed_model() -> Model:
    """Of everything special something, all of it compressed."""
    states = {name: replace(state, codec="zstd") for name, state in STATES.items()}
    return Model([replace(p, codec="zstd") for p in manifest(bf16=True, small=True)], states)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def files(folder: Path) -> dict[str, int]:
    """The inodes of a generation's chunk files, by their keys."""
    return {str(file.relative_to(folder)): file.stat().st_ino for file in folder.glob("*/*/c/**/*") if file.is_file()}


@pytest.fixture(scope="module")
def whole(small_chunks, tmp_path_factory) -> tuple[Model, list[Path]]:
    folder, model = tmp_path_factory.mktemp("whole"), compressed_model()
    write_shards(folder, model, 2)
    return model, data_dirs(folder, 2)


def test_zarr_python_and_tensorstore_read_every_array_of_the_union(whole, tmp_path):
    model, dirs = whole
    union = unite([folder / "gpt/generations/00000005" for folder in dirs], tmp_path / "union")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group = zarr.open_group(union, mode="r")
    for path, tensor in expected_arrays(model).items():
        assert np.asarray(group[path][...]).tobytes() == bits(tensor), path
        assert read_with_tensorstore(union, path).tobytes() == bits(tensor), path
    document = json.loads((union / "weight/layers.0.weight/zarr.json").read_text())
    assert [codec["name"] for codec in document["codecs"]] == ["bytes", "zstd"]
    assert json.loads((union / "step/layers.0.weight/zarr.json").read_text())["codecs"][1:] == []
    assert json.loads((union / "zarr.json").read_text())["attributes"]["zero_ps"]["format"] == 2


def test_a_server_reads_what_it_wrote(whole):
    model, dirs = whole
    for shard, folder in enumerate(dirs):
        read = list(JobStore(folder, "gpt", shard, 2).read_chunks(5))
        for found, written in zip(read, model.chunks(shard, 2), strict=True):
            assert torch.equal(found.weight, written.weight)
            assert all(torch.equal(found.state[name], written.state[name]) for name in written.state)


def test_verify_open_export_and_reshard_work(whole, tmp_path):
    model, dirs = whole
    assert verify(dirs).ok
    group = ps.open_generation(dirs)
    for path, tensor in expected_arrays(model).items():
        assert np.asarray(group[path][...]).tobytes() == bits(tensor), path
    export(dirs, ExportOptions("torch", tmp_path / "out"))
    loaded = torch.load(tmp_path / "out/model.pt", weights_only=True)
    assert all(torch.equal(loaded[name], value) for name, value in values(model).items())
    targets = data_dirs(tmp_path / "new", 3)
    done = reshard(dirs, targets)
    assert done.copied_bytes == 0 and verify(targets).ok
    inodes = {inode for folder in dirs for inode in files(folder / "gpt/generations/00000005").values()}
    assert {i for folder in targets for i in files(folder / "gpt/generations/00000005").values()} == inodes


def test_what_is_compressed_alike_is_linked_and_anything_else_written_anew(tmp_path):
    """From none to zstd, to zstd, and back to none: values stay, and each generation is what it says."""
    plain = Model([replace(p, codec=None) for p in compressed_model().manifest], STATES)
    zstd = compressed_model()
    store = JobStore(tmp_path, "gpt", 0, 1)
    store.write(plain.header(step=0), plain.chunks(), plain.state_arrays)
    for step, model in enumerate((zstd, zstd, plain), 1):
        store.write(model.header(step=step), store.chunk_files(step - 1), model.state_arrays)
    folders = [store.path(key) for key in store.committed()]
    found = [files(folder) for folder in folders]
    assert found[1] == found[2]
    step_files = {key for key in found[0] if key.startswith("step/")}
    assert all((found[0][key] == found[1][key]) == (key in step_files) for key in found[0])
    for step in range(4):
        for read, written in zip(store.read_chunks(step), plain.chunks(), strict=True):
            assert torch.equal(read.weight, written.weight)
            assert all(torch.equal(read.state[name], written.state[name]) for name in written.state)
    for file in found[0]:
        assert (folders[0] / file).read_bytes() == (folders[3] / file).read_bytes()


@pytest.mark.parametrize("damage", [lambda data: data[:-3], lambda data: bytes([data[0] ^ 1]) + data[1:]])
def test_a_damaged_file_is_named(tmp_path, damage):
    model = compressed_model()
    store = JobStore(tmp_path / "shard-0", "gpt", 0, 1)
    path = store.write(model.header(step=5), model.chunks(), model.state_arrays).path
    file = path / "weight/layers.0.weight/c/1/0"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DamagedError, match=f"{file} is damaged: its CRC32C is"):
        read: list[ChunkState] = list(store.read_chunks(5))
        assert read
    assert [problem.file for problem in verify([tmp_path / "shard-0"]).problems] == [file]
    with pytest.raises(DamagedError, match=str(file)):
        ps.open_generation(tmp_path / "shard-0")["weight/layers.0.weight"][...]


def test_without_compression_nothing_says_that_there_could_be(tmp_path):
    """Earlier versions read what this one writes."""
    model = Model(manifest(bf16=True, small=True), ADAM_STATE)
    (path,) = write_shards(tmp_path, model, 1)
    assert not [file for file in path.rglob("zarr.json") if 'codec"' in file.read_text()]
    assert json.loads((path / "zarr.json").read_text())["attributes"]["zero_ps"]["format"] == 1
