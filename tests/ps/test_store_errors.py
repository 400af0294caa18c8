"""Every error says what was wrong, where, and what to do."""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ps.store import (
    ChunkState,
    CommitKey,
    DamagedError,
    DataDir,
    DataDirError,
    DiskFullError,
    GenerationMissingError,
    JobStore,
    NewerFormatError,
    StateArray,
    StoredParameter,
    StoreError,
)
from ps.store.testing import ADAM_STATE, Model


def model_of(*shape: int) -> Model:
    return Model([StoredParameter("layer.weight", shape, torch.float32, "parameter", True)], ADAM_STATE)


@pytest.fixture
def stored(tmp_path) -> tuple[JobStore, Path]:
    """A store with generations 3 and 4, and the folder of the latter."""
    model, store = model_of(9, 4), JobStore(tmp_path, "gpt", 0, 1)
    store.write(model.header(step=3), model.chunks(), ADAM_STATE)
    return store, store.write(model.header(step=4), model.chunks(), ADAM_STATE).path


def says(*parts: str) -> str:
    return ".*".join(re.escape(part) for part in parts)


# ---------------------------------------------------------------- data folders


def test_a_folder_is_created_claimed_and_found_again(tmp_path):
    path = tmp_path / "a/b"
    with DataDir(path, 1, 2) as data_dir:
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert json.loads((path / "zero-ps.json").read_text()) == {"format": 1, "shard": 1, "num_shards": 2}
        assert data_dir.jobs() == []
        model = model_of(9, 4)
        store = data_dir.job_store("gpt")
        store.write(model.header(1, 2), model.chunks(1, 2), ADAM_STATE)
        assert stat.S_IMODE((path / "gpt").stat().st_mode) == 0o700
    with DataDir(path, 1, 2) as data_dir:
        assert data_dir.jobs() == ["gpt"] and data_dir.job_store("gpt").committed_steps() == [0]


@pytest.mark.parametrize(("shard", "num_shards"), [(0, 2), (1, 3)])
def test_a_folder_of_another_shard_is_refused(tmp_path, shard, num_shards):
    model = model_of(9, 4)
    with DataDir(tmp_path, 1, 2) as data_dir:
        data_dir.job_store("gpt").write(model.header(1, 2), model.chunks(1, 2), ADAM_STATE)
    expected = says(
        f"shard {shard}/{num_shards} cannot open {tmp_path}", "it holds shard 1/2 of job 'gpt'", "--shard 1/2"
    )
    with pytest.raises(DataDirError, match=expected):
        DataDir(tmp_path, shard, num_shards)
    DataDir(tmp_path, 1, 2).close()  # the refusal left no lock behind


def test_a_folder_in_use_is_refused_and_names_the_process(tmp_path):
    script = (
        "import sys; from pathlib import Path; from ps.store import DataDir;"
        "d = DataDir(Path(sys.argv[1]), 0, 1); print('open', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == "open\n"
        with pytest.raises(DataDirError, match=says("pid", str(process.pid), "stop that server")):
            DataDir(tmp_path, 0, 1)
        process.kill()
    DataDir(tmp_path, 0, 1).close()


def test_a_folder_is_free_again_once_closed(tmp_path):
    first = DataDir(tmp_path, 0, 1)
    with pytest.raises(DataDirError, match=str(os.getpid())):
        DataDir(tmp_path, 0, 1)
    first.close()
    first.close()
    DataDir(tmp_path, 0, 1).close()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    if os.getuid() == 0:  # root may write wherever the file system lets it
        folder = Path("/proc/zero-ps-test")
    else:
        folder = tmp_path / "locked"
        folder.mkdir(mode=0o500)
    with pytest.raises(DataDirError, match=says(f"cannot open {folder}", "choose a --data-dir")):
        DataDir(folder, 0, 1)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(DataDirError, match=says(f"cannot open {path}", "choose a --data-dir")):
            DataDir(path, 0, 1)


def test_a_folder_of_a_newer_format_is_refused(tmp_path):
    (tmp_path / "zero-ps.json").write_text('{"format": 3, "shard": 0, "num_shards": 1, "new": []}')
    with pytest.raises(NewerFormatError, match=says(str(tmp_path / "zero-ps.json"), "format 3", "newer")):
        DataDir(tmp_path, 0, 1)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 1, "shard": 5, "num_shards": 2}'])
def test_a_damaged_claim_is_refused(tmp_path, content):
    (tmp_path / "zero-ps.json").write_text(content)
    with pytest.raises(DamagedError, match=says(str(tmp_path / "zero-ps.json"), "put back the file")):
        DataDir(tmp_path, 0, 1)


def test_shards_and_job_names_are_checked(tmp_path):
    for shard, num_shards in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="there is no shard"):
            DataDir(tmp_path, shard, num_shards)
    with DataDir(tmp_path, 0, 1) as data_dir:
        for name in ("../x", "a/b", "", "zero-ps.json"):
            with pytest.raises(ValueError, match="is not valid"):
                data_dir.job_store(name)


# ---------------------------------------------------------------- damaged generations


def test_a_missing_generation_names_those_that_are_there(stored):
    store, _ = stored
    for read in (store.read_header, store.read_chunks):
        with pytest.raises(GenerationMissingError, match=says("job 'gpt'", "step 5", "it has 3, 4")):
            read(5)


@pytest.mark.parametrize("key", ["weight/layer.weight/c/0/0", "exp_avg/layer.weight/c/0/0",
                                 "step/layer.weight/c/0"])  # fmt: skip
def test_a_missing_chunk_file_is_named(stored, key):
    store, path = stored
    (path / key).unlink()
    with pytest.raises(
        DamagedError, match=says(str(path / key), "No such file", "put the file back", "go back to step 3")
    ):
        list(store.read_chunks(4))


@pytest.mark.parametrize("size", [0, 100, 145, 4000])
def test_a_chunk_file_of_the_wrong_size_is_named(stored, size):
    store, path = stored
    file = path / "exp_avg/layer.weight/c/0/0"
    file.write_bytes(bytes(size))
    with pytest.raises(DamagedError, match=says(str(file), f"{size} bytes", "144", "go back to step")):
        list(store.read_chunks(4))


def edit(file: Path, change) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def zero_ps(change):
    return lambda document: change(document["attributes"]["zero_ps"])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda d: d.pop("attributes"), "attributes"),
        (zero_ps(lambda d: d.pop("manifest")), "manifest"),
        (zero_ps(lambda d: d.update(manifest={})), "manifest"),
        (zero_ps(lambda d: d["manifest"].append(d["manifest"][0])), "twice"),
        (zero_ps(lambda d: d["manifest"][0].update(name="../../etc")), "cannot be stored"),
        (zero_ps(lambda d: d["manifest"][0].update(name="zarr.json")), "cannot be stored"),
        (zero_ps(lambda d: d["manifest"][0].update(shape=[-1])), "shape"),
        (zero_ps(lambda d: d["manifest"][0].update(shape=[1.5])), "shape"),
        (zero_ps(lambda d: d["manifest"][0].update(shape=[True])), "shape"),
        (zero_ps(lambda d: d["manifest"][0].update(shape=[2**40, 2**40])), "too large"),
        (zero_ps(lambda d: d["manifest"][0].update(dtype="object")), "dtype"),
        (zero_ps(lambda d: d["manifest"][0].update(kind="thing")), "kind"),
        (zero_ps(lambda d: d["manifest"][0].update(trainable=1)), "trainable"),
        (zero_ps(lambda d: d["state"].update({"../x": {"dtype": None, "per_element": True}})), "../x"),
        (zero_ps(lambda d: d["state"].update(weight={"dtype": None, "per_element": True})), "weight"),
        (zero_ps(lambda d: d.update(step=7)), "step"),
        (zero_ps(lambda d: d.pop("commit_id")), "commit_id"),
        (zero_ps(lambda d: d.update(commit_id="")), "commit_id"),
        (zero_ps(lambda d: d.update(commit_id="../x")), "commit_id"),
        (zero_ps(lambda d: d.update(num_shards=2**40)), "num_shards"),
        (zero_ps(lambda d: d.update(metadata={})), "metadata"),
        (zero_ps(lambda d: d.update(optimizer={"class_name": "SGD"})), "groups"),
        (zero_ps(lambda d: d.update(optimizer={"class_name": "SGD", "groups": [
            {"options": {"lr": {"number": "1"}}, "parameters": []}]})), "lr"),
        (zero_ps(lambda d: d.update(optimizer={"class_name": "SGD", "groups": [
            {"options": {}, "parameters": [1]}]})), "parameters"),
    ],
)  # fmt: skip
def test_damaged_metadata_names_file_and_field(stored, change, field):
    store, path = stored
    edit(path / "zarr.json", change)
    with pytest.raises(DamagedError, match=says(str(path / "zarr.json"), field)) as error:
        store.read_header(4)
    assert f"or move {path} away on every server to go back to step 3" in str(error.value)
    assert store.read_header(3).key.step == 3


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
@pytest.mark.parametrize("name", ["zarr.json", "shard-0-of-1.json"])
def test_a_file_that_is_not_json_is_named(stored, name, content):
    store, path = stored
    (path / name).write_bytes(content)
    with pytest.raises(DamagedError, match=says(str(path / name), "go back to step")):
        list(store.read_chunks(4))


def test_a_chunk_that_the_shard_file_does_not_list_is_named(stored):
    store, path = stored
    edit(path / "shard-0-of-1.json", lambda d: d["arrays"].pop("weight/layer.weight"))
    with pytest.raises(DamagedError, match=says("chunk 0 of weight/layer.weight")):
        list(store.read_chunks(4))


@pytest.mark.parametrize("name", ["zarr.json", "shard-0-of-1.json"])
def test_a_generation_of_a_newer_format_is_refused(stored, name):
    store, path = stored
    newer = (lambda d: d.update(format=9)) if name.startswith("shard") else zero_ps(
        lambda d: d.update(format=9)
    )  # fmt: skip
    edit(path / name, newer)
    with pytest.raises(NewerFormatError, match=says(str(path / name), "format 9")):
        list(store.read_chunks(4))


# ---------------------------------------------------------------- writing


def test_a_full_disk_leaves_earlier_generations_and_no_leftovers(small_disk):
    model, store = model_of(256, 1024), JobStore(small_disk, "gpt", 0, 1)  # 3 MiB with its state
    store.write(model.header(step=1), model.chunks(), ADAM_STATE)
    store.write(model.header(step=2), model.chunks(), ADAM_STATE)
    with pytest.raises(DiskFullError, match=says("generation 3 of job 'gpt'", str(small_disk), "free some")):
        store.write(model.header(step=3), model.chunks(), ADAM_STATE)
    assert {p.name for p in (small_disk / "gpt/generations").iterdir()} == {"00000001", "00000002"}
    (chunk,) = store.read_chunks(2)
    assert torch.equal(chunk.weight, model.values[0])
    store.prune(keep=1, complete=CommitKey(2, "0"), current=CommitKey(2, "0"))
    store.write(model.header(step=3), model.chunks(), ADAM_STATE)
    assert store.committed_steps() == [2, 3]


def test_a_folder_that_went_away_is_an_error_of_the_store(tmp_path):
    model = model_of(9, 4)
    (tmp_path / "gpt").write_text("a file where the job's folder belongs")
    with pytest.raises(StoreError, match=says("generation 0 of job 'gpt'", str(tmp_path))):
        JobStore(tmp_path, "gpt", 0, 1).write(model.header(), model.chunks(), ADAM_STATE)


def test_what_does_not_fit_the_header_is_refused(tmp_path):
    model, store = model_of(9, 4), JobStore(tmp_path, "gpt", 0, 1)
    (good,) = model.chunks()

    def refuses(chunks, message, header=None, states=ADAM_STATE):
        with pytest.raises(ValueError, match=message):
            store.write(header or model.header(), chunks, states)
        assert store.committed_steps() == []

    refuses([], "1 chunks of shard 0/1 were not given")
    refuses([good, good], "came twice")
    refuses([ChunkState(0, 1, good.weight)], "not one of shard 0/1")
    refuses([ChunkState(0, 0, good.weight[:8])], "expected")
    refuses([ChunkState(0, 0, good.weight.double())], "expected")
    refuses([ChunkState(0, 0, good.weight, {"exp_avg": good.weight[0]})], "exp_avg/layer.weight")
    refuses([ChunkState(0, 0, good.weight, {"other": good.weight})], "'other'")
    refuses([good], "belong", header=model.header(0, 2))
    refuses([good], "belong", header=model.header(job="other"))
    refuses([good], "negative", header=model.header(step=-1))
    refuses([good], "cannot be called", states={"weight": StateArray("weight", None, per_element=True)})


@pytest.mark.parametrize("names", [["a/b"], ["zarr.json"], ["__x"], ["same", "same"], [".."]])
def test_names_that_cannot_be_stored_are_refused_before_anything_is_written(tmp_path, names):
    model = Model([StoredParameter(n, (3,), torch.float32, "parameter", True) for n in names], {})
    with pytest.raises(ValueError, match=re.escape(names[0])):
        JobStore(tmp_path, "gpt", 0, 1).write(model.header(), model.chunks(), {})
    assert list(tmp_path.iterdir()) == []
