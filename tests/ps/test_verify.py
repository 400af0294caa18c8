"""`zero-ps verify`: a commit that is whole passes, and whatever is wrong with one is found and named."""

import itertools
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ps import open_generation
from ps.cli import main
from ps.store import DataDir, unfinished
from ps.store.testing import ADAM_STATE, Model
from ps.tools import verification
from ps.tools.generation_check import check_generation
from ps.tools.verification import verify
from tests.ps.stored import data_dirs, manifest, small_manifest, unite, write_shards

pytestmark = pytest.mark.usefixtures("small_chunks")


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(small_manifest(), ADAM_STATE)


@pytest.fixture(scope="module")
def original(small_chunks, tmp_path_factory, model: Model) -> Path:
    folder = tmp_path_factory.mktemp("original")
    write_shards(folder, model, 2, step=4)
    write_shards(folder, model, 2, step=5)
    return folder


@pytest.fixture
def dirs(tmp_path: Path, original: Path) -> list[Path]:
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    return data_dirs(tmp_path, 2)


def find(dirs: list[Path], key: str, step: int = 5) -> Path:
    """The one file of a chunk, whichever server has it."""
    (found,) = [file for folder in dirs if (file := folder / f"gpt/generations/{step:08d}/{key}").is_file()]
    return found


def edit_list(dirs: list[Path], edit: Callable[[dict], None], shard: int = 0) -> Path:
    file = dirs[shard] / f"gpt/generations/00000005/shard-{shard}-of-2.json"
    document = json.loads(file.read_text())
    edit(document["arrays"])
    file.write_text(json.dumps(document))
    return file


@pytest.mark.parametrize("servers", [1, 2, 3])
def test_what_servers_committed_passes(tmp_path, servers):
    write_shards(tmp_path, Model(manifest(bf16=True, small=True), ADAM_STATE), servers)
    report = verify(data_dirs(tmp_path, servers))
    assert report.ok and not report.problems and not report.notes
    (generation,) = report.generations
    files = [file for file in tmp_path.rglob("*") if file.is_file() and re.search("/c(/|$)", str(file))]
    assert generation.files == len(files)
    assert generation.bytes == sum(file.stat().st_size for file in files)
    assert (generation.job, generation.key.step, generation.num_shards) == ("gpt", 5, servers)


def test_only_the_newest_is_read_unless_all_are_asked_for(dirs):
    find(dirs, "weight/up.bias/c/0", step=4).unlink()
    assert verify(dirs).ok
    assert not verify(dirs, step=4).ok
    everything = verify(dirs, all_steps=True)
    assert [bool(generation.problems) for generation in everything.generations] == [True, False]


def test_files_without_a_checksum_are_counted(dirs, capsys):
    for shard in range(2):
        edit_list(dirs, lambda arrays: [array.pop("crc32c") for array in arrays.values()], shard)
    (generation,) = verify(dirs).generations
    assert generation.without_checksum == generation.files > 0 and not generation.problems
    damage_bit(dirs)
    assert verify(dirs).ok, "only the size can be compared"
    damage_size(dirs)
    assert not verify(dirs).ok
    main(["verify", "--step", "5", *map(str, dirs)])
    assert f"{generation.files} files have no checksum" in capsys.readouterr().out


def test_folders_copied_over_each_other_pass(dirs, tmp_path):
    union = unite([folder / "gpt/generations/00000005" for folder in dirs], tmp_path / "union")
    assert verify([union]).ok


def damage_size(dirs: list[Path]) -> Path:
    file = find(dirs, "exp_avg/up.weight/c/1/0")
    os.truncate(file, 1000)
    return file


def damage_bit(dirs: list[Path]) -> Path:
    file = find(dirs, "weight/up.weight/c/1/0")
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)
    return file


def damage_checksum(dirs: list[Path]) -> Path:
    file = find(dirs, "weight/up.bias/c/0")
    shard = dirs.index(file.parents[6])
    edit_list(dirs, lambda arrays: arrays["weight/up.bias"]["crc32c"].__setitem__(0, 17), shard)
    return file


def damage_checksums(dirs: list[Path]) -> Path:
    return edit_list(dirs, lambda arrays: arrays["weight/up.weight"]["crc32c"].append(17))


def damage_missing(dirs: list[Path]) -> Path:
    file = find(dirs, "weight/up.weight/c/0/0")
    file.unlink()
    return file


def damage_stray(dirs: list[Path]) -> Path:
    file = find(dirs, "weight/up.weight/c/0/0")
    stray = file.parent.parent / "7" / "0"
    stray.parent.mkdir()
    shutil.copy(file, stray)
    return stray


def damage_array(dirs: list[Path]) -> Path:
    file = dirs[1] / "gpt/generations/00000005/weight/up.weight/zarr.json"
    file.write_text(file.read_text().replace("31", "32"))
    return file


def damage_array_missing(dirs: list[Path]) -> Path:
    file = dirs[1] / "gpt/generations/00000005/weight/up.bias/zarr.json"
    file.unlink()
    return file


def damage_inner_group(dirs: list[Path]) -> Path:
    file = dirs[0] / "gpt/generations/00000005/exp_avg/zarr.json"
    file.write_text("[]")
    return file


def damage_attributes(dirs: list[Path]) -> Path:
    file = dirs[1] / "gpt/generations/00000005/zarr.json"
    file.write_text(file.read_text().replace("AdamW", "Adam"))
    return file


def damage_manifest(dirs: list[Path]) -> Path:
    file = dirs[0] / "gpt/generations/00000005/zarr.json"
    file.write_text(file.read_text().replace('"manifest"', '"manifesto"'))
    return file


def damage_group(dirs: list[Path]) -> Path:
    file = dirs[1] / "gpt/generations/00000005/zarr.json"
    file.write_text("{")
    return file


def damage_job(dirs: list[Path]) -> Path:
    for folder in dirs:
        (folder / "gpt").rename(folder / "other")
    return dirs[0] / "other/generations/00000005/zarr.json"


def damage_list(dirs: list[Path]) -> Path:
    file = dirs[1] / "gpt/generations/00000005/shard-1-of-2.json"
    file.write_text(file.read_text()[:-50])
    return file


def damage_claim(dirs: list[Path]) -> Path:
    file = dirs[1] / "zero-ps.json"
    file.write_text(file.read_text().replace('"shard": 1', '"shard": 0'))
    return file


def damage_unreadable_claim(dirs: list[Path]) -> Path:
    (dirs[1] / "zero-ps.json").write_text("x")
    return dirs[1] / "zero-ps.json"


def damage_no_list(dirs: list[Path]) -> Path:
    (dirs[1] / "gpt/generations/00000005/shard-1-of-2.json").unlink()
    return dirs[1] / "gpt/generations/00000005"


def damage_unknown_array(dirs: list[Path]) -> Path:
    return edit_list(dirs, lambda arrays: arrays.update({"weight/down": next(iter(arrays.values()))}))


def damage_unknown_chunk(dirs: list[Path]) -> Path:
    return edit_list(dirs, lambda arrays: arrays["weight/up.weight"]["chunks"].__setitem__(0, 9))


@pytest.mark.parametrize(
    "damage",
    [
        damage_size,
        damage_bit,
        damage_checksum,
        damage_checksums,
        damage_missing,
        damage_stray,
        damage_array,
        damage_array_missing,
        damage_inner_group,
        damage_attributes,
        damage_manifest,
        damage_group,
        damage_job,
        damage_list,
        damage_no_list,
        damage_claim,
        damage_unreadable_claim,
        damage_unknown_array,
        damage_unknown_chunk,
    ],
)
def test_whatever_is_wrong_is_found_and_named(dirs, damage):
    file = damage(dirs)
    report = verify(dirs)
    assert not report.ok
    assert any(str(file) in str(problem) for problem in report.problems), list(map(str, report.problems))
    assert all(str(problem.file) in str(problem) and "; " in str(problem) for problem in report.problems)


def test_a_single_generation_that_cannot_be_read_is_a_problem_too(dirs):
    file = dirs[1] / "gpt/generations/00000005/zarr.json"
    file.write_text("{")
    report = verify([folder / "gpt/generations/00000005" for folder in dirs])
    assert not report.ok and any(str(file) in str(problem) for problem in report.problems)


def test_a_commit_of_a_version_that_named_no_dimensions_passes_and_opens_in_xarray(dirs, model):
    xarray = pytest.importorskip("xarray")
    for file in (file for folder in dirs for file in folder.glob("gpt/generations/00000005/*/*/zarr.json")):
        document = json.loads(file.read_text())
        assert len(document.pop("dimension_names")) == len(document["shape"])
        file.write_text(json.dumps(document))
    assert verify(dirs).ok
    dataset = xarray.open_zarr(open_generation(dirs).store, group="weight", consolidated=False, chunks=None)
    assert dataset["up.weight"].dims == ("up.weight.0", "up.weight.1")
    assert (dataset["up.weight"].values == model.values[0].numpy()).all()


def test_a_folder_that_is_still_being_filled_is_a_note(dirs):
    unfinished.put(dirs[0], unfinished.Mark("gpt", "import"))
    report = verify(dirs)
    assert report.ok and f"{dirs[0]} is being filled by 'zero-ps import'" in report.notes[0]


def test_a_chunk_that_no_server_lists_is_missed(dirs):
    with_it = find(dirs, "weight/up.bias/c/0")
    edit_list(dirs, lambda arrays: arrays.pop("weight/up.bias"), shard=dirs.index(with_it.parents[6]))
    with_it.unlink()
    assert any("chunk 0 of weight/up.bias is nowhere" in str(problem) for problem in verify(dirs).problems)


def test_a_chunk_on_the_wrong_server_is_found(dirs):
    right = find(dirs, "weight/up.bias/c/0")
    shard = dirs.index(right.parents[6])
    wrong = dirs[1 - shard] / right.relative_to(dirs[shard])
    wrong.parent.mkdir(parents=True)
    right.rename(wrong)
    moved = {}
    edit_list(dirs, lambda arrays: moved.update(arrays.pop("weight/up.bias")), shard=shard)
    edit_list(dirs, lambda arrays: arrays.update({"weight/up.bias": moved}), shard=1 - shard)
    (problem,) = verify(dirs).problems
    assert problem.file == wrong and f"belongs to shard {shard}" in str(problem)


def test_a_server_named_twice_through_a_copy_is_found(dirs, tmp_path):
    shutil.copytree(dirs[0], tmp_path / "copy")
    report = verify([*dirs, tmp_path / "copy"])
    assert not report.ok and all("is there twice" in str(problem) for problem in report.problems)


def test_a_commit_that_some_servers_lack_is_a_note_and_the_one_before_is_checked(dirs, tmp_path, model):
    write_shards(tmp_path, model, 2, step=6)
    shutil.rmtree(dirs[1] / "gpt/generations/00000006")
    report = verify(dirs)
    assert report.ok and report.generations[0].key.step == 5
    assert report.notes == [
        "step 6, commit c0 lacks shard 1/2: it is a commit that is going on, or one that was interrupted"
    ]


def test_a_server_with_several_disks(tmp_path, model):
    """Of which each has a part of every generation."""
    disks = [tmp_path / "a0", tmp_path / "a1"]
    for step in (5, 6):
        for shard, folders in enumerate((disks, [tmp_path / "b"])):
            header = model.header(shard, 2, step=step, commit_id="c0")
            with DataDir(folders, shard, 2) as opened:
                opened.job_store("gpt").write(header, model.chunks(shard, 2), model.state_arrays)
    everything = [*disks, tmp_path / "b"]
    assert [generation.files for generation in verify(everything, all_steps=True).generations] == [14, 14]
    report = verify(everything[1:])
    assert not report.ok
    assert "Step 6 lacks disk 0 of 2 of shard 0/2. Name all data folders of all servers" in str(report.problems[0])
    assert "lacks" not in str(verify(everything, step=7).problems[0]), "nothing that is there is incomplete"
    # As a server that was killed between the renames on its disks leaves it.
    (disks[1] / "gpt/generations/00000006").rename(disks[1] / "gpt/generations/.00000006.tmp-0")
    report = verify(everything)
    assert report.ok and report.generations[0].key.step == 5
    assert "step 6, commit c0 lacks disk 1 of 2 of shard 0/2" in report.notes[0]


def test_a_server_that_was_not_named_fails(dirs):
    report = verify(dirs[:1])
    assert not report.ok and "Name all data folders of all servers" in str(report.problems[0])


def test_servers_that_commit_and_delete_meanwhile_cause_no_problem(tmp_path, model):
    """Each commit replaces all older ones, as with --keep 1."""
    write_shards(tmp_path, model, 2, step=0)
    dirs = data_dirs(tmp_path, 2)
    stop = threading.Event()

    def commit() -> None:
        step = 0
        while not stop.is_set():
            step += 1
            write_shards(tmp_path, model, 2, step=step)
            for shard, folder in enumerate(dirs):
                with DataDir(folder, shard, 2) as opened:
                    store = opened.job_store("gpt")
                    newest = store.committed()[-1]
                    store.prune(keep=1, complete=newest, current=newest)

    thread = threading.Thread(target=commit)
    thread.start()
    try:
        seen: set[int] = set()
        end = time.monotonic() + 60
        while len(seen) < 10 and time.monotonic() < end:
            report = verify(dirs, all_steps=bool(len(seen) % 2))
            assert report.ok, list(map(str, report.problems))
            seen.add(report.generations[-1].key.step)
        assert len(seen) == 10
    finally:
        stop.set()
        thread.join()


def test_a_server_that_deletes_faster_than_one_can_read_is_named(dirs, model, monkeypatch):
    steps = itertools.count(6)

    def replaced_meanwhile(*arguments, **options):
        for folder in dirs:
            shutil.rmtree(folder / "gpt")
        write_shards(dirs[0].parent, model, 2, step=next(steps))
        return check_generation(*arguments, **options)

    monkeypatch.setattr(verification, "check_generation", replaced_meanwhile)
    report = verify(dirs)
    assert not report.ok and "start it with a larger --keep" in str(report.problems[0])
    assert len(report.problems) == 1 and next(steps) == 11


class TestCommand:
    def test_exit_status_and_summary(self, dirs, capsys):
        assert main(["verify", *map(str, dirs)]) == 0
        captured = capsys.readouterr()
        assert re.fullmatch(r"job 'gpt', step 5, commit c0, 2 servers: \d+ chunk files, .* KiB: ok.*\n", captured.out)
        assert captured.err.startswith("checking step 5: ")
        file = damage_missing(dirs)
        assert main(["verify", *map(str, dirs)]) == 1
        out = capsys.readouterr().out
        assert (
            f"{file} cannot be read (No such file or directory); put it back from a copy, or go back to step 4" in out
        )
        assert "1 problem" in out

    def test_json(self, dirs, capsys):
        assert main(["verify", "--json", *map(str, dirs)]) == 0
        captured = capsys.readouterr()
        assert not captured.err
        document = json.loads(captured.out)
        assert document["ok"] and document["generations"][0]["step"] == 5 and document["problems"] == []
        file = damage_size(dirs)
        assert main(["verify", "--json", "--all-steps", *map(str, dirs)]) == 1
        document = json.loads(capsys.readouterr().out)
        assert not document["ok"] and [problem["file"] for problem in document["problems"]] == [str(file)]
        assert [generation["ok"] for generation in document["generations"]] == [True, False]

    def test_wrong_arguments_are_told_apart_from_damage(self, dirs, tmp_path, capsys):
        assert main(["verify", str(tmp_path)]) == 2
        assert "name the servers' folders in it, shard-0, shard-1" in capsys.readouterr().err
        with pytest.raises(SystemExit) as ended:
            main(["verify", "--step", "-1", str(tmp_path)])
        assert ended.value.code == 2
