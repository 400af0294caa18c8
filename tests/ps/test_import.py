"""`zero-ps import`: a checkpoint becomes a commit that servers restore, or nothing."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ps.cli import main
from ps.store import DataDir, DataDirError, DiskFullError, unfinished
from ps.store.generation_set import find_generation
from ps.store.testing import ADAM_STATE, Model
from ps.tools import import_model as module
from ps.tools.checkpoint import open_checkpoint
from ps.tools.errors import ToolError
from ps.tools.export_model import ExportOptions, export
from ps.tools.import_model import ImportOptions, import_model, plan_import
from ps.tools.renaming import Rule, read_rules, rename
from ps.tools.verification import verify
from tests.ps.exported import assert_same, few
from tests.ps.stored import data_dirs, write_shards

GENERATOR = torch.Generator().manual_seed(0)
CHECKPOINT = {
    "up.weight": torch.randn(2600, 1031, generator=GENERATOR),
    "up.bias": torch.randn(7, generator=GENERATOR).to(torch.bfloat16),
    "half": torch.randn(3, 2, generator=GENERATOR).to(torch.float16),
    "base.0": torch.randn(2100, 1031, generator=GENERATOR).to(torch.bfloat16),
    "base.1": torch.randn(5, generator=GENERATOR),
    "double": torch.randn(2, 2, generator=GENERATOR).to(torch.float64),
    "gain": torch.tensor(0.5),
    "empty": torch.empty(0, 3),
    "norm.running_mean": torch.randn(4, generator=GENERATOR),
    "norm.num_batches_tracked": torch.tensor(7),
    "mask": torch.tensor([True, False, True]),
}
BUFFERS = ("norm.*", "mask")


def save(path: Path, tensors: dict[str, torch.Tensor] = CHECKPOINT) -> Path:
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    return path


def save_with_index(folder: Path) -> Path:
    folder.mkdir()
    names = list(CHECKPOINT)
    parts = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    for file, held in parts.items():
        save(folder / file, {name: CHECKPOINT[name] for name in held})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, held in parts.items() for name in held}}))
    return index


def imported(dirs: list[Path], out: Path) -> dict[str, torch.Tensor]:
    """What the servers' folders hold, through the export."""
    export(dirs, ExportOptions("safetensors", out))
    return safetensors.torch.load_file(out / "model.safetensors")


def options(**changes: object) -> ImportOptions:
    return ImportOptions(**{"job": "gpt", "buffers": BUFFERS, "frozen": ("base.*",), **changes})


# ---------------------------------------------------------------- what is stored


@pytest.mark.parametrize("num_shards", [1, 3])
def test_every_tensor_is_stored_as_the_model_will_ask_for_it(tmp_path, num_shards):
    dirs = data_dirs(tmp_path, num_shards)
    done = import_model(save(tmp_path / "a.safetensors"), dirs, options(step=40))
    assert verify(dirs).ok
    expected = dict(CHECKPOINT)
    for name in ("up.bias", "half"):  # fp32 masters of what is trained; frozen parameters and buffers as they are
        expected[name] = expected[name].float()
    assert_same(imported(dirs, tmp_path / "out"), expected)
    header = find_generation(dirs).header
    assert (header.job, header.key, header.optimizer, header.manifest) == ("gpt", done.key, None, done.manifest)
    assert header.key.step == 40 and json.loads(header.metadata) == {"imported_from": "a.safetensors"}
    assert {p.name for p in header.manifest if p.kind == "buffer"} == {
        "norm.running_mean", "norm.num_batches_tracked", "mask"
    }  # fmt: skip
    assert {p.name for p in header.manifest if p.trainable} == {
        "up.weight", "up.bias", "half", "double", "gain", "empty"
    }  # fmt: skip


def test_a_dtype_is_that_of_the_models_parameters(tmp_path):
    plan = plan_import(open_checkpoint(save(tmp_path / "a.safetensors")), options(dtype=torch.bfloat16))
    dtypes = {planned.parameter.name: planned.parameter.dtype for planned in plan}
    assert dtypes["base.0"] == dtypes["base.1"] == torch.bfloat16
    assert dtypes["up.weight"] == dtypes["double"] == torch.float32  # masters
    assert dtypes["norm.running_mean"] == torch.float32 and dtypes["mask"] == torch.bool
    dirs = data_dirs(tmp_path, 2)
    import_model(tmp_path / "a.safetensors", dirs, options(dtype=torch.bfloat16))
    found = imported(dirs, tmp_path / "out")
    assert torch.equal(found["base.1"], CHECKPOINT["base.1"].to(torch.bfloat16))
    # Masters keep all that the checkpoint has; trainers pull them in the model's dtype.
    assert torch.equal(found["up.weight"], CHECKPOINT["up.weight"])


@pytest.mark.parametrize("given", ["index", "folder", "folder with a file", "file"])
def test_a_checkpoint_is_found_in_each_of_its_forms(tmp_path, given):
    source = tmp_path / "checkpoint"
    if given in ("index", "folder"):
        index = save_with_index(source)
        source = index if given == "index" else source
    else:
        source.mkdir()
        file = save(source / "any.safetensors")
        source = file if given == "file" else source
    tensors = open_checkpoint(source)
    assert {tensor.name: tensor.entry.shape for tensor in tensors} == {n: t.shape for n, t in CHECKPOINT.items()}
    dirs = data_dirs(tmp_path, 1)
    import_model(source, dirs, options(dtype=torch.float32))
    assert imported(dirs, tmp_path / "out").keys() == CHECKPOINT.keys()


# ---------------------------------------------------------------- names


def test_rules_name_one_tensor_a_prefix_or_what_fits_an_expression():
    names = ["model.h.0.w", "model.h.1.w", "model.wte", "head", "other"]
    rules = ["model.wte=embedding", r"re:model\.h\.(\d+)\.(.*)=blocks.\1.\2", "hea*=top.hea*"]
    assert rename(names, map(Rule.parse, rules)) == {
        "model.h.0.w": "blocks.0.w",
        "model.h.1.w": "blocks.1.w",
        "model.wte": "embedding",
        "head": "top.head",
        "other": "other",
    }
    assert rename(["a", "ab"], [Rule.parse("*=x.*")]) == {"a": "x.a", "ab": "x.ab"}
    assert rename(["x.a", "b"], [Rule.parse("x.*=*")]) == {"x.a": "a", "b": "b"}
    assert rename([r"a\1"], [Rule.parse(r"a\1=b\1")]) == {r"a\1": r"b\1"}
    assert rename(["ab"], [Rule.parse("a*=c*"), Rule.parse("re:c.=d")][:1]) == {"ab": "cb"}


def test_rules_that_fit_nothing_and_names_that_clash_are_listed():
    with pytest.raises(ToolError, match=r"no tensor is left for 'x=y', 'a\*=c\*'; .* The names are 'a', 'b'"):
        rename(["a", "b"], map(Rule.parse, ["x=y", "a=b2", "a*=c*"]))
    with pytest.raises(ToolError, match=r"get one name: 'b' \(from 'a', 'b'\), 'd' \(from 'c', 'd'\); change --map"):
        rename(["a", "b", "c", "d"], map(Rule.parse, ["a=b", "c=d"]))


@pytest.mark.parametrize("text", ["", "a", "=b", "a=", "a*b=c", "a*=c", "re:(=b", r"re:a=\1", r"re:a=\g<x>"])
def test_what_is_no_rule_is_refused(text):
    with pytest.raises(ValueError):
        Rule.parse(text)


def test_a_file_has_a_rule_a_line(tmp_path):
    (tmp_path / "map").write_text("# names of the old code\n\na=b\n  c*=d*  \n")
    assert read_rules(tmp_path / "map") == ["a=b", "c*=d*"]
    with pytest.raises(ToolError, match="No such file"):
        read_rules(tmp_path / "none")


def test_names_are_mapped_before_patterns_of_the_model_are_applied(tmp_path):
    source = save(tmp_path / "a.safetensors", {"old.w": torch.ones(2), "old.tied": torch.ones(2), "n": torch.ones(1)})
    wanted = ImportOptions("gpt", rules=(Rule.parse("old.*=new.*"),), skip=("old.tied",), frozen=("new.*",))
    plan = plan_import(open_checkpoint(source), wanted)
    assert [(p.parameter.name, p.parameter.trainable) for p in plan] == [("n", True), ("new.w", False)]


ESCAPING = ["../../escape", "/etc/passwd", "a/b", "..", ".hidden"]
BAD_NAMES = [*ESCAPING, "__zarr", "", "a\nb", "\udc80", "x" * 201, "zarr.json"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_would_leave_its_folder_is_refused(tmp_path, name):
    header = json.dumps({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ToolError, match="these names cannot be stored: .*use --map"):
        import_model(tmp_path / "a.safetensors", [tmp_path / "data"], ImportOptions("gpt"))
    assert not (tmp_path / "data").exists()


def test_what_is_not_said_of_a_tensor_is_asked_for(tmp_path):
    tensors = open_checkpoint(save(tmp_path / "a.safetensors"))
    with pytest.raises(ToolError, match=r"'norm.num_batches_tracked' \(I64\), 'mask' \(BOOL\); say with --buffers or"):
        plan_import(tensors, ImportOptions("gpt"))
    with pytest.raises(ToolError, match=r"no tensor fits --frozen 'layer\*'; the names are .* and 1 more"):
        plan_import(tensors, options(frozen=("layer*", "base.*")))
    with pytest.raises(ToolError, match=r"'mask' fit both --frozen and --buffers"):
        plan_import(tensors, options(frozen=("mask",)))
    with pytest.raises(ToolError, match="no tensor that is not skipped"):
        plan_import(tensors, options(skip=("*",)))


def test_a_dtype_that_cannot_be_stored_is_named_unless_it_is_skipped(tmp_path):
    save(tmp_path / "a.safetensors", {"w": torch.ones(2), "q": torch.ones(2).to(torch.float8_e4m3fn)})
    tensors = open_checkpoint(tmp_path / "a.safetensors")
    with pytest.raises(ToolError, match=r"does not store 'q' \(F8_E4M3\)"):
        plan_import(tensors, ImportOptions("gpt"))
    assert len(plan_import(tensors, ImportOptions("gpt", skip=("q",)))) == 1


# ---------------------------------------------------------------- checkpoints that are not right


def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path):
    index = save_with_index(tmp_path / "checkpoint")
    right = json.loads(index.read_text())["weight_map"]
    first, second = sorted(set(right.values()))
    wrong = {
        "no file has it": {**right, "more": first},
        f"it is in {second}": {**right, "mask": first},
        "does not list tensor 'mask'": {name: file for name, file in right.items() if name != "mask"},
        "cannot read": {**right, "mask": "model-3.safetensors"},
        "beside the index": {**right, "mask": f"../checkpoint/{first}"},
        "file of tensor 'mask' is '/etc/passwd'": {**right, "mask": "/etc/passwd"},
        "is 'a\\x00.safetensors'": {**right, "mask": "a\0.safetensors"},
        "file of tensor 'mask' is '3'": {**right, "mask": 3},
        "has no weight_map": {},
    }
    for message, weight_map in wrong.items():
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ToolError) as error:
            open_checkpoint(index)
        assert message in str(error.value), message
    for text in ("[]", "{", "3"):
        index.write_text(text)
        with pytest.raises(ToolError, match="no weight_map|is not JSON"):
            open_checkpoint(index)
    (tmp_path / "checkpoint" / second).unlink()
    save(tmp_path / "checkpoint" / second, {name: CHECKPOINT[name] for name in right if right[name] == first})
    index.write_text(json.dumps({"weight_map": right}))
    with pytest.raises(ToolError, match=rf"tensor 'up.weight' is both in .*{first} and in {second}"):
        open_checkpoint(index)


def test_the_optimizer_beside_an_exported_model_is_passed_over(tmp_path):
    save(tmp_path / "model.safetensors", {"w": torch.ones(1)})
    save(tmp_path / "optimizer-00001-of-00001.safetensors", {"exp_avg/w": torch.ones(1)})
    (tmp_path / "optimizer.safetensors.index.json").write_text("{}")
    assert [tensor.name for tensor in open_checkpoint(tmp_path)] == ["w"]


def test_a_folder_without_one_checkpoint_says_so(tmp_path):
    with pytest.raises(ToolError, match=r"has neither \*.safetensors nor"):
        open_checkpoint(tmp_path)
    save(tmp_path / "a.safetensors", {"w": torch.ones(1)})
    save(tmp_path / "b.safetensors", {"w": torch.ones(1)})
    with pytest.raises(ToolError, match=r"several checkpoints \(a.safetensors, b.safetensors\)"):
        open_checkpoint(tmp_path)
    with pytest.raises(ToolError, match=r"cannot read .*c.safetensors: No such file"):
        open_checkpoint(tmp_path / "c.safetensors")


def test_a_file_that_shrinks_while_it_is_read_leaves_nothing(tmp_path, monkeypatch):
    source = save(tmp_path / "a.safetensors")
    dirs = data_dirs(tmp_path, 2)

    def shrink(*arguments):
        os.truncate(source, 5_000_000)

    monkeypatch.setattr(module, "_check_space", shrink)
    with pytest.raises(ToolError, match=r"a.safetensors became shorter while it was read"):
        import_model(source, dirs, options())
    assert [path for path in tmp_path.rglob("0*") if path.is_dir() and path.parent.name == "generations"] == []


# ---------------------------------------------------------------- folders


def test_a_job_that_exists_is_left_alone(tmp_path):
    write_shards(tmp_path, Model(few(), ADAM_STATE), 2)
    source, dirs = save(tmp_path / "a.safetensors"), data_dirs(tmp_path, 2)
    with pytest.raises(ToolError, match=r"job 'gpt' has commits in .*shard-0 already \(step 5, commit c0\)"):
        import_model(source, dirs, options())
    import_model(source, dirs, options(job="other"))
    with pytest.raises(ToolError, match=r"job 'other' has commits"):
        import_model(source, dirs, options(job="other"))
    assert find_generation(dirs, job="gpt").key.step == 5 and find_generation(dirs, job="other").key.step == 0


def test_a_commit_of_which_only_a_part_is_left_is_not_taken_for_an_import(tmp_path):
    write_shards(tmp_path, Model(few(), ADAM_STATE), 2)
    source, dirs = save(tmp_path / "a.safetensors"), data_dirs(tmp_path, 2)
    (dirs[0] / "gpt").rename(tmp_path / "moved")
    with pytest.raises(ToolError, match=r"has commits in .*shard-1 already"):
        import_model(source, dirs, options())


KILLED = """
import os, signal, sys
from pathlib import Path
from ps.store import JobStore, unfinished
from ps.tools.import_model import ImportOptions, import_model
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
write, clear = JobStore.write, unfinished.clear
cleared = []
def killed_writing(self, header, *rest, **more):
    return die() if header.shard == 1 else write(self, header, *rest, **more)
def killed_finishing(folder):
    return die() if cleared else cleared.append(clear(folder))
if sys.argv[1] == "writing":
    JobStore.write = killed_writing
else:
    unfinished.clear = killed_finishing
import_model(Path(sys.argv[2]), [Path(p) for p in sys.argv[3:]], ImportOptions("gpt", buffers=("norm.*", "mask")))
"""


@pytest.mark.parametrize("instant", ["writing", "finishing"])
def test_a_killed_import_keeps_servers_from_starting_until_it_is_run_again(tmp_path, instant):
    """One that lacks its part would take the job for a new one, and the others would then lack a commit in common."""
    source, dirs = save(tmp_path / "a.safetensors"), data_dirs(tmp_path, 3)
    done = subprocess.run([sys.executable, "-c", KILLED, instant, source, *dirs], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    for shard, folder in list(enumerate(dirs))[instant == "finishing" :]:
        with pytest.raises(DataDirError, match="'zero-ps import' has not finished filling it with job 'gpt'; run that"):
            DataDir(folder, shard, 3)
    with pytest.raises(ToolError, match="is being filled with job 'gpt'; run that 'zero-ps import' again first"):
        import_model(source, dirs, options(job="other"))
    again = import_model(source, dirs, options())
    assert find_generation(dirs).key == again.key and verify(dirs).ok
    for shard, folder in enumerate(dirs):
        with DataDir(folder, shard, 3) as data_dir:
            assert data_dir.job_store("gpt").committed() == [again.key]


def test_a_killed_import_is_no_reason_to_remove_what_others_wrote(tmp_path):
    """Run again with a folder in which the job is another one."""
    source, dirs = save(tmp_path / "a.safetensors"), data_dirs(tmp_path, 2)
    write_shards(tmp_path, Model(few(), ADAM_STATE), 2)
    (dirs[0] / "gpt").rename(tmp_path / "moved")
    unfinished.put(dirs[0], unfinished.Mark("gpt", "import"))
    with pytest.raises(ToolError, match=r"has commits in .*shard-1 already \(step 5, commit c0\)"):
        import_model(source, dirs, options())


def test_folders_that_cannot_be_the_servers_are_refused(tmp_path):
    source, dirs = save(tmp_path / "a.safetensors"), data_dirs(tmp_path, 2)
    with pytest.raises(ToolError, match="named twice in --to"):
        import_model(source, [dirs[0], dirs[0]], options())
    with pytest.raises(ToolError, match="job name 'a/b' is not valid"):
        import_model(source, dirs, options(job="a/b"))
    with DataDir(dirs[0], 0, 3):
        pass
    with pytest.raises(DataDirError, match="it holds shard 0/3"):
        import_model(source, dirs, options())
    with DataDir(dirs[1], 0, 1), pytest.raises(DataDirError, match=f"the process with pid {os.getpid()} is using it"):
        import_model(source, [dirs[1]], options())


def test_a_full_disk_says_so_and_leaves_nothing(tmp_path, small_disk, monkeypatch):
    source = save(tmp_path / "a.safetensors")
    with pytest.raises(ToolError, match=r"small/a has room for .* and its part of the model takes"):
        import_model(source, [small_disk / "a"], options())
    monkeypatch.setattr(module, "_check_space", lambda manifest, folders: None)
    with pytest.raises(DiskFullError, match="small.* is full"):
        import_model(source, [tmp_path / "a", small_disk / "b"], options(dtype=torch.float32))
    for folder, shard in ((tmp_path / "a", 0), (small_disk / "b", 1)):
        with DataDir(folder, shard, 2) as data_dir:
            assert data_dir.jobs() == []
        assert not (folder / "gpt").exists()


# ---------------------------------------------------------------- the command

# The peak of resident memory, in bytes, beyond what the libraries take.
MEASURE = """
import json, sys
from ps.process import memory_bytes
import tempfile, ps.tools.export_model, ps.tools.import_model, ps.tools.torch_file
from ps.cli import main
def peak():
    return memory_bytes()[1]
with tempfile.TemporaryDirectory() as folder:  # loads what torch loads for it
    ps.tools.torch_file.TorchFile(ps.tools.export_model.Path(folder) / "a", [], lambda found: found)
before = peak()
for command in json.loads(sys.argv[1]):
    assert main(command) == 0
    print(command[0], peak() - before)
"""


@pytest.mark.slow
def test_neither_import_nor_export_holds_the_model(tmp_path):
    bound = 150 << 20
    # One tensor is larger than the bound already.
    source = save(tmp_path / "a.safetensors", {name: torch.full((1 << 13, 7000), 0.5) for name in ("a", "b")})
    assert source.stat().st_size > 2.9 * bound
    dirs = list(map(str, data_dirs(tmp_path, 2)))
    commands = [
        ["import", "--from", str(source), "--to", *dirs, "--job", "gpt"],
        ["export", *dirs, "--format", "torch", "--dtype", "bf16", "--out", str(tmp_path / "pt")],
    ]
    command = [sys.executable, "-c", MEASURE, json.dumps(commands)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < bound, done.stdout
    exported = torch.load(tmp_path / "pt/model.pt", weights_only=True, mmap=True)
    assert torch.all(exported["b"] == 0.5)


def test_the_command_says_how_to_start_the_servers(tmp_path, capsys):
    source, dirs = save(tmp_path / "a.safetensors"), data_dirs(tmp_path, 2)
    flags = ["--job", "gpt", "--map", "up.*=top.*", "gain=scale", "--buffers", "norm.*", "--buffers", "mask"]
    command = ["import", "--from", str(source), "--to", *map(str, dirs), *flags]
    assert main(command) == 0
    first, *starts = capsys.readouterr().out.splitlines()
    assert "11 tensors, 8 of them trained" in first and first.endswith("Start the servers:")
    assert starts == [f"  zero-ps serve --shard {i}/2 --data-dir {folder}" for i, folder in enumerate(dirs)]
    names = {parameter.name for parameter in find_generation(dirs).header.manifest}
    assert {"top.weight", "top.bias", "scale"} <= names and not {"up.weight", "gain"} & names
    assert main(command) == 2
    assert "zero-ps import: job 'gpt' has commits in" in capsys.readouterr().err
    assert main([*command, "--map", "a*b"]) == 2
    assert "zero-ps import: --map 'a*b' is not OLD=NEW" in capsys.readouterr().err
