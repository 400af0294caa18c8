"""`zero-ps export`: what other tools read of a commit is what was committed, bit for bit."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import zarr

from ps.cli import main
from ps.store import OptimizerGroup, OptimizerSpec
from ps.store.testing import ADAM_STATE, Model
from ps.tools.errors import ToolError
from ps.tools.export_model import ExportOptions, export
from tests.ps.exported import adam_model, assert_same, bits, few, values
from tests.ps.stored import data_dirs, manifest, unite, write_shards

TRAINED = [0, 1, 2, 5]
"""The parameters of `manifest` that are trained and not empty."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Model, list[Path]]:
    folder = tmp_path_factory.mktemp("whole")
    model = adam_model(manifest(bf16=True))
    write_shards(folder, model, 3)
    return model, data_dirs(folder, 3)


@pytest.fixture
def small(tmp_path) -> list[Path]:
    write_shards(tmp_path, adam_model(few()), 2)
    return data_dirs(tmp_path, 2)


def load_by_index(folder: Path, base: str = "model") -> dict[str, torch.Tensor]:
    """As Hugging Face's tools load several files."""
    index = json.loads((folder / f"{base}.safetensors.index.json").read_text())
    found = {}
    for name in sorted(set(index["weight_map"].values())):
        with safetensors.safe_open(folder / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            assert all(index["weight_map"][key] == name for key in file.keys())  # noqa: SIM118
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in found.values())}
    assert found.keys() == index["weight_map"].keys()
    return found


# ---------------------------------------------------------------- safetensors


def test_one_safetensors_file_is_the_one_that_the_library_writes(whole, tmp_path):
    model, dirs = whole
    done = export(dirs, ExportOptions("safetensors", tmp_path / "out"))
    assert done.files == ("model.safetensors",) and (done.job, done.key.step) == ("gpt", 5)
    safetensors.torch.save_file(values(model), tmp_path / "expected", metadata={"format": "pt"})
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()
    assert_same(safetensors.torch.load_file(tmp_path / "out/model.safetensors"), values(model))


def test_several_safetensors_files_have_an_index_and_keep_to_their_size(whole, tmp_path):
    model, dirs = whole
    done = export(dirs, ExportOptions("safetensors", tmp_path / "out", max_shard_bytes=5_000_000))
    # In the order of the manifest: the first is larger than a file may be and has one of its own.
    assert done.files == (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    )
    with safetensors.safe_open(tmp_path / "out/model-00001-of-00002.safetensors", "pt") as file:
        assert list(file.keys()) == ["layers.0.weight"]
    assert_same(load_by_index(tmp_path / "out"), values(model))


def test_files_are_split_where_the_next_tensor_does_not_fit(whole, tmp_path):
    model, dirs = whole
    frozen = values(model)["frozen.weight"].nbytes
    export(dirs, ExportOptions("safetensors", tmp_path / "out", max_shard_bytes=frozen + 9 + 8))
    sizes = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        sizes[path.name] = sum(t.nbytes for t in safetensors.torch.load_file(path).values())
    assert len(sizes) == 3 and sorted(sizes.values())[:2] == [28 + 4 + 240, frozen + 9 + 8]
    assert_same(load_by_index(tmp_path / "out"), values(model))


def test_optimizer_state_comes_in_files_of_its_own(whole, tmp_path):
    model, dirs = whole
    export(dirs, ExportOptions("safetensors", tmp_path / "out", state=True, max_shard_bytes=12_000_000))
    expected = {}
    for index in (0, 1):  # those that are in a group
        for name, tensor in model.states[index].items():
            expected[f"{name}/{model.manifest[index].name}"] = tensor[0] if name == "step" else tensor
    assert_same(load_by_index(tmp_path / "out", "optimizer"), expected)
    assert_same(load_by_index(tmp_path / "out"), values(model))
    assert json.loads((tmp_path / "out/optimizer.json").read_text()) == {
        "class_name": "AdamW",
        "groups": [
            {
                "options": {"lr": 0.1, "betas": [0.9, 0.999], "eps": 1e-8},
                "parameters": ["layers.0.weight", "layers.0.bias"],
            }
        ],
    }


# ---------------------------------------------------------------- torch


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_the_model_without_pickles(whole, tmp_path, mmap):
    model, dirs = whole
    assert export(dirs, ExportOptions("torch", tmp_path / "out")).files == ("model.pt",)
    assert_same(torch.load(tmp_path / "out/model.pt", weights_only=True, mmap=mmap), values(model))


def test_torch_files_are_whole_archives(whole, tmp_path):
    _, dirs = whole
    export(dirs, ExportOptions("torch", tmp_path / "out", state=True))
    for name in ("model.pt", "optimizer.pt"):
        with zipfile.ZipFile(tmp_path / "out" / name) as archive:
            assert archive.testzip() is None
            assert all(info.CRC for info in archive.infolist() if info.file_size)


def test_an_optimizer_of_torch_takes_the_state(tmp_path):
    entries = manifest(bf16=True)
    model = adam_model(entries)
    groups = (OptimizerGroup({"lr": 0.5, "betas": (0.8, 0.9)}, (5, 0)), OptimizerGroup({"lr": 0.25}, (2,)))
    write_shards(tmp_path, model, 2, optimizer=OptimizerSpec("AdamW", groups))
    export(data_dirs(tmp_path, 2), ExportOptions("torch", tmp_path / "out", state=True))
    state = torch.load(tmp_path / "out/optimizer.pt", weights_only=True)
    params = {index: torch.nn.Parameter(model.values[index].clone()) for index in TRAINED}
    optimizer = torch.optim.AdamW([{"params": [params[5], params[0]]}, {"params": [params[2]]}])
    optimizer.load_state_dict(state)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    assert [group["betas"] for group in optimizer.param_groups] == [(0.8, 0.9), (0.9, 0.999)]
    for index in (0, 2, 5):
        expected = {name: t[0] if name == "step" else t for name, t in model.states[index].items()}
        assert_same(optimizer.state[params[index]], expected)
        params[index].grad = torch.ones_like(params[index])
    optimizer.step()
    assert optimizer.state[params[2]]["step"] == model.states[2]["step"][0] + 1


# ---------------------------------------------------------------- zarr


def test_zarr_python_and_tensorstore_read_the_group(whole, tmp_path):
    ts = pytest.importorskip("tensorstore")
    model, dirs = whole
    export(dirs, ExportOptions("zarr", tmp_path / "out", state=True))
    group = zarr.open_group(tmp_path / "out", mode="r")
    expected = {f"{'weight' if p.kind == 'parameter' else 'buffer'}/{p.name}": v for p, v in zip(
        model.manifest, model.values, strict=True)}  # fmt: skip
    for index in (0, 1):
        for name, tensor in model.states[index].items():
            expected[f"{name}/{model.manifest[index].name}"] = tensor[0] if name == "step" else tensor
    assert {path for path, node in group.members(max_depth=None) if isinstance(node, zarr.Array)} == expected.keys()
    for path, tensor in expected.items():
        data = bits(tensor).numpy().tobytes()
        assert group[path].shape == tensor.shape and np.asarray(group[path][...]).tobytes() == data, path
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / "out" / path)}}
        assert ts.open(spec, read=True).result().read().result().tobytes() == data, path
    assert group.attrs["zero_ps_export"]["step"] == 5
    assert group.attrs["zero_ps_export"]["optimizer"]["class_name"] == "AdamW"


def test_the_group_shares_no_file_with_the_generation(small, tmp_path):
    export(small, ExportOptions("zarr", tmp_path / "out"))
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "out").rglob("*") if path.is_file())


# ---------------------------------------------------------------- what is exported


@pytest.mark.parametrize(("name", "dtype"), [("safetensors", torch.bfloat16), ("torch", torch.float16)])
def test_a_dtype_is_for_what_is_floating_point_in_the_model(whole, tmp_path, name, dtype):
    model, dirs = whole
    export(dirs, ExportOptions(name, tmp_path / "out", dtype=dtype, state=True))
    if name == "torch":
        found = torch.load(tmp_path / "out/model.pt", weights_only=True)
        state = torch.load(tmp_path / "out/optimizer.pt", weights_only=True)["state"][0]
    else:
        found = safetensors.torch.load_file(tmp_path / "out/model.safetensors")
        stored = safetensors.torch.load_file(tmp_path / "out/optimizer.safetensors")
        state = {kind: stored[f"{kind}/layers.0.weight"] for kind in ADAM_STATE}
    converted = {n: v.to(dtype) if v.is_floating_point() else v for n, v in values(model).items()}
    assert_same(found, converted)
    assert_same(state, {n: t[0] if n == "step" else t for n, t in model.states[0].items()})


def test_the_commit_that_is_asked_for_is_exported(tmp_path):
    models = {step: Model(few(), ADAM_STATE, seed=step) for step in (4, 6)}
    for step, model in models.items():
        write_shards(tmp_path, model, 2, step=step, commit_id=f"a{step}")
    for step, out in ((None, "newest"), (4, "older")):
        export(data_dirs(tmp_path, 2), ExportOptions("safetensors", tmp_path / out), step=step)
        found = safetensors.torch.load_file(tmp_path / out / "model.safetensors")
        assert_same(found, values(models[step or 6]))


def test_folders_copied_over_each_other_are_exported_too(tmp_path):
    model = adam_model(few())
    union = unite(write_shards(tmp_path, model, 3), tmp_path / "union")
    export([union], ExportOptions("safetensors", tmp_path / "out"))
    assert_same(safetensors.torch.load_file(tmp_path / "out/model.safetensors"), values(model))


@pytest.mark.parametrize("name", ["safetensors", "torch", "zarr"])
def test_an_optimizer_that_keeps_nothing_has_only_its_options(tmp_path, name):
    model = Model(few(), {})
    write_shards(tmp_path, model, 1, optimizer=OptimizerSpec("SGD", (OptimizerGroup({"lr": 0.5}, (0, 1)),)))
    export(data_dirs(tmp_path, 1), ExportOptions(name, tmp_path / "out", state=True))
    if name == "torch":
        optimizer = torch.optim.SGD([torch.nn.Parameter(value) for value in model.values[:2]])
        optimizer.load_state_dict(torch.load(tmp_path / "out/optimizer.pt", weights_only=True))
        assert optimizer.param_groups[0]["lr"] == 0.5 and not optimizer.state
    elif name == "safetensors":
        assert safetensors.torch.load_file(tmp_path / "out/optimizer.safetensors") == {}


def test_state_of_parameters_that_were_never_stepped_is_left_out(tmp_path):
    model = adam_model(few())
    model.states[0] = {}
    write_shards(tmp_path, model, 2)
    export(data_dirs(tmp_path, 2), ExportOptions("torch", tmp_path / "out", state=True))
    state = torch.load(tmp_path / "out/optimizer.pt", weights_only=True)
    assert state["state"].keys() == {1} and state["param_groups"][0]["params"] == [0, 1]


def test_state_that_is_not_torchs_is_refused(tmp_path):
    model = adam_model(few())
    model.states[0]["step"][1] += 1
    write_shards(tmp_path, model, 2)
    with pytest.raises(ToolError, match=r"'up.weight' differ in 'step' .*leave out --state"):
        export(data_dirs(tmp_path, 2), ExportOptions("torch", tmp_path / "out", state=True))
    assert not any(path.name.startswith((".out", "out")) for path in tmp_path.iterdir())


def test_state_of_a_job_without_optimizer_is_refused(tmp_path):
    write_shards(tmp_path, adam_model(few()), 1, optimizer=None)
    with pytest.raises(ToolError, match="has no optimizer at step 5"):
        export(data_dirs(tmp_path, 1), ExportOptions("torch", tmp_path / "out", state=True))


# ---------------------------------------------------------------- the command


def test_the_command_says_what_it_wrote(small, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", *map(str, small), "--format", "safetensors", "--dtype", "bf16", "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert shown.err == "exporting step 5: 5.1 MiB\n"
    assert shown.out.splitlines() == [
        f"job 'gpt', step 5, commit c0: 4 tensors, 5.1 MiB, in {out}:",
        "  model.safetensors",
    ]
    assert main(["export", *map(str, small), "--format", "torch", "--out", str(out)]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith(f"zero-ps export: {out} exists; choose another")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["DIR", "--out", "x"], "the following arguments are required: --format"),
        (["DIR", "--format", "torch"], "the following arguments are required: --out"),
        (["DIR", "--format", "pickle", "--out", "x"], "argument --format: invalid choice: 'pickle'"),
        (["DIR", "--format", "torch", "--out", ""], "argument --out: the name is empty"),
        (["DIR", "--format", "torch", "--out", "x", "--step", "-1"], "argument --step: "),
        (["DIR", "--format", "torch", "--out", "x", "--max-shard-size", "big"], "argument --max-shard-size: 'big' is"),
    ],
)
def test_wrong_arguments_are_refused_in_a_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        main(["export", *arguments])
    shown = capsys.readouterr().err
    assert ended.value.code == 2 and message in shown and shown.count("\n") == 1


def test_a_folder_that_holds_no_commit_is_named(tmp_path, capsys):
    assert main(["export", str(tmp_path / "none"), "--format", "torch", "--out", str(tmp_path / "out")]) == 2
    assert f"zero-ps export: cannot read {tmp_path / 'none'}: No such file" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "example"), [("export", "--state --step 1000"), ("import", "--map 'model.*=*'")])
def test_help_has_examples(capsys, name, example):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and "examples:" in shown and example in shown
