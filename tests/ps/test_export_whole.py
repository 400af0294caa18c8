"""`zero-ps export`: a folder is there with all that belongs in it, or not at all, and nothing else is replaced."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ps.cli import main
from ps.store import DamagedError
from ps.tools import export_model
from ps.tools.errors import ToolError
from ps.tools.export_model import ExportOptions, export
from tests.ps.exported import adam_model, few
from tests.ps.stored import data_dirs, manifest, write_shards


@pytest.fixture
def small(tmp_path) -> list[Path]:
    write_shards(tmp_path, adam_model(few()), 2)
    return data_dirs(tmp_path, 2)


def test_what_exists_is_refused_and_what_an_export_wrote_is_replaced(small, tmp_path):
    out = tmp_path / "out"
    for name in ("safetensors", "zarr", "torch", "safetensors"):
        if out.exists():
            before = sorted(path.name for path in out.iterdir())
            with pytest.raises(ToolError, match=r"exists; choose another --out, or add --overwrite"):
                export(small, ExportOptions(name, out))
            assert sorted(path.name for path in out.iterdir()) == before
        done = export(small, ExportOptions(name, out, overwrite=True))
        assert sorted(path.name for path in out.iterdir()) == list(done.files)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_overwrite_takes_no_folder_that_holds_something_else(small, tmp_path):
    for name, content in (("home", "letter.txt"), ("model", "config.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / content).write_text("mine")
        with pytest.raises(ToolError, match=f"'{content}', which no export wrote"):
            export(small, ExportOptions("torch", tmp_path / name, overwrite=True))
        assert (tmp_path / name / content).read_text() == "mine"
    with pytest.raises(ToolError, match="no export wrote"):
        export(small, ExportOptions("torch", small[0], overwrite=True))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ToolError, match="is not a folder"):
        export(small, ExportOptions("torch", tmp_path / "file", overwrite=True))


@pytest.mark.parametrize("name", ["safetensors", "torch", "zarr"])
def test_a_damaged_chunk_leaves_nothing(small, tmp_path, name):
    chunk = small[1] / "gpt/generations/00000005/weight/up.weight/c/1/0"
    if not chunk.exists():
        chunk = small[0] / chunk.relative_to(small[1])
    flipped = bytearray(chunk.read_bytes())
    flipped[1000] ^= 1
    chunk.write_bytes(flipped)
    with pytest.raises(DamagedError, match="up.weight/c/1/0 is damaged: its CRC32C is"):
        export(small, ExportOptions(name, tmp_path / "out"))
    os.truncate(chunk, 100)
    with pytest.raises(DamagedError, match="up.weight/c/1/0 has 100 bytes"):
        export(small, ExportOptions(name, tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard-0", "shard-1"]


@pytest.mark.parametrize("name", ["safetensors", "torch", "zarr"])
def test_nothing_has_its_name_before_all_of_it_is_written(small, tmp_path, monkeypatch, name):
    before = []

    def watched(generation, places, copy=export_model.copy):
        for written in copy(generation, places):
            before.append((tmp_path / "out").exists())
            yield written
        before.append((tmp_path / "out").exists())

    monkeypatch.setattr(export_model, "copy", watched)
    export(small, ExportOptions(name, tmp_path / "out"))
    assert len(before) > 4 and not any(before)
    assert (tmp_path / "out").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from ps.tools import export_model
def copy(generation, places, copy=export_model.copy):
    for number, written in enumerate(copy(generation, places)):
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        yield written
export_model.copy = copy
export_model.export([Path(p) for p in sys.argv[2:]], export_model.ExportOptions("torch", Path(sys.argv[1])))
"""


def test_a_killed_export_leaves_nothing_under_its_name(small, tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "out"), *map(str, small)]
    assert subprocess.run(command, check=False, timeout=100).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert [path.name.startswith(".out.tmp-") for path in tmp_path.iterdir() if path not in small] == [True]
    export(small, ExportOptions("torch", tmp_path / "out"))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a defect")])
def test_an_interrupted_export_leaves_nothing(small, tmp_path, monkeypatch, capsys, error):
    def interrupted(generation, places):
        yield 1
        raise error

    monkeypatch.setattr(export_model, "copy", interrupted)
    arguments = ["export", *map(str, small), "--format", "zarr", "--out", str(tmp_path / "out")]
    if isinstance(error, KeyboardInterrupt):
        assert main(arguments) == 130
        assert capsys.readouterr().err.endswith("zero-ps export: interrupted; what was written is removed again\n")
    else:
        with pytest.raises(RuntimeError):
            main(arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard-0", "shard-1"]


@pytest.mark.parametrize("name", ["safetensors", "torch", "zarr"])
def test_a_full_disk_says_so_and_leaves_nothing(tmp_path, small_disk, monkeypatch, name):
    write_shards(tmp_path, adam_model(manifest(bf16=True)), 1)
    dirs = data_dirs(tmp_path, 1)
    with pytest.raises(ToolError, match=r"has room for .* and the export takes 1\d.\d MiB"):
        export(dirs, ExportOptions(name, small_disk / "out"))
    # Others may fill the disk meanwhile.
    monkeypatch.setattr(export_model, "_check_space", lambda folder, needed: None)
    with pytest.raises(ToolError, match=r"the disk of .*small is full; what was written is removed"):
        export(dirs, ExportOptions(name, small_disk / "out"))
    assert list(small_disk.iterdir()) == []
