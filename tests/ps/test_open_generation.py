"""`ps.open_generation`: the whole model as one zarr group, over the folders of several servers."""

import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

import ps
from ps.store import DamagedError, GenerationMissingError
from ps.store.testing import ADAM_STATE, Model
from tests.ps.stored import STATES, data_dirs, expected_arrays, manifest, small_manifest, unite, write_shards

pytestmark = pytest.mark.usefixtures("small_chunks")


@pytest.fixture(scope="module")
def whole(small_chunks, tmp_path_factory) -> tuple[Model, list[Path]]:
    folder = tmp_path_factory.mktemp("whole")
    model = Model(manifest(bf16=True, small=True), STATES)
    write_shards(folder, model, 3)
    return model, data_dirs(folder, 3)


@pytest.fixture
def small(tmp_path: Path) -> list[Path]:
    write_shards(tmp_path, Model(small_manifest(), ADAM_STATE), 2)
    return data_dirs(tmp_path, 2)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_every_array_reads_as_it_was_committed(whole):
    model, dirs = whole
    group = ps.open_generation(dirs)
    for path, tensor in expected_arrays(model).items():
        array = group[path]
        assert array.shape == tensor.shape
        assert np.asarray(array[...]).tobytes() == bits(tensor), path
    assert group.attrs["zero_ps"]["step"] == 5
    assert np.array_equal(group["weight/layers.0.weight"][1:4, 7], model.values[0][1:4, 7])


def test_lists_exactly_the_arrays_of_the_model_without_warning(whole):
    model, dirs = whole
    store = ps.open_generation(dirs).store
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for consolidated in (True, False):
            group = zarr.open_group(store, mode="r", use_consolidated=consolidated)
            arrays = {path for path, node in group.members(max_depth=None) if isinstance(node, zarr.Array)}
            assert arrays == set(expected_arrays(model))
            assert "frozen.weight (7, 601) bfloat16" in repr(group.tree())


def test_stays_what_it_is_through_pickle_as_dask_needs(whole):
    model, dirs = whole
    group = ps.open_generation(dirs)
    copy = pickle.loads(pickle.dumps(group))
    assert copy == group
    assert copy["buffer/count"][...] == model.values[8]


@pytest.mark.parametrize("copied", [False, True], ids=["opened", "copied"])
def test_xarray_reads_a_commit(whole, tmp_path, copied):
    xarray = pytest.importorskip("xarray")
    model, dirs = whole
    parts = [folder / "gpt/generations/00000005" for folder in dirs]
    store = unite(parts, tmp_path / "union") if copied else ps.open_generation(dirs).store
    for group, sizes in (("weight", model.values[0].shape), ("exp_avg", model.values[0].shape), ("step", None)):
        dataset = xarray.open_zarr(store, group=group, consolidated=False, chunks=None)
        found = dataset["layers.0.weight"]
        assert found.shape == sizes or group == "step"
        assert found.dims == tuple(f"layers.0.weight.{dim}" for dim in range(found.ndim))
    dataset = xarray.open_zarr(store, group="weight", consolidated=False, chunks=None)
    assert np.array_equal(dataset["layers.0.weight"][1:3, 3], model.values[0][1:3, 3])
    assert dataset["layers.0.scale"] == model.values[2]


def test_cannot_be_written(whole):
    group = ps.open_generation(whole[1])
    with pytest.raises(ValueError, match="read-only"):
        group["buffer/count"][...] = 3
    with pytest.raises(ValueError, match="read-only"):
        group.create_array("more", shape=(3,), dtype="int8")


def chunk_files(dirs: list[Path], array: str) -> list[Path]:
    return sorted(
        file for folder in dirs for file in folder.glob(f"gpt/generations/*/{array}/c/**/*") if file.is_file()
    )


def test_a_missing_chunk_is_an_error_that_names_it_and_no_zeros(small):
    group = ps.open_generation(small)
    file = chunk_files(small, "weight/up.weight")[1]
    file.unlink()
    with pytest.raises(DamagedError, match=str(file)):
        group["weight/up.weight"][...]


def test_a_chunk_of_the_wrong_size_is_an_error_that_names_it(small):
    group = ps.open_generation(small)
    file = chunk_files(small, "exp_avg/up.weight")[0]
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(DamagedError, match=rf"{file} has \d+ bytes"):
        group["exp_avg/up.weight"][:3]


def test_a_chunk_with_another_checksum_is_an_error_that_names_it(small):
    group = ps.open_generation(small)
    file = chunk_files(small, "weight/up.weight")[0]
    file.write_bytes(bytes(len(file.read_bytes())))
    with pytest.raises(DamagedError, match=f"{file} has the CRC32C"):
        group["weight/up.weight"][:3]


def test_state_that_was_never_stepped_reads_as_zeros(tmp_path):
    model = Model(small_manifest(), ADAM_STATE)
    model.states = [{} for _ in model.states]
    write_shards(tmp_path, model, 2)
    group = ps.open_generation(data_dirs(tmp_path, 2))
    assert not np.asarray(group["exp_avg/up.weight"][...]).any()
    assert np.array_equal(group["weight/up.weight"][...], model.values[0])


def test_chooses_job_and_step(small, tmp_path):
    model = Model(small_manifest(), {}, seed=1)
    write_shards(tmp_path, model, 2, step=8, job="other")
    write_shards(tmp_path, model, 2, step=9, job="gpt")
    assert ps.open_generation(small, job="gpt").attrs["zero_ps"]["step"] == 9
    assert ps.open_generation(small, job="gpt", step=5).attrs["zero_ps"]["step"] == 5
    assert ps.open_generation([str(small[0] / "other"), small[1]], job="other").attrs["zero_ps"]["step"] == 8
    with pytest.raises(GenerationMissingError, match="several jobs"):
        ps.open_generation(small)


def test_a_codec_pipeline_that_knows_no_such_store_gives_way(small):
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarrs says that it takes zarr's own pipeline instead
        group = ps.open_generation(small)
        assert group["weight/up.weight"][...].any()
