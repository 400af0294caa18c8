"""`zero-ps reshard`: another number of servers, the same bytes."""

import errno
import multiprocessing
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

import ps
from protos import layout
from ps.cli import main
from ps.store import (
    CommitKey,
    DamagedError,
    DataDir,
    DataDirError,
    GenerationMissingError,
    JobStore,
    OptimizerSpec,
    unfinished,
)
from ps.store.testing import ADAM_STATE, Model
from ps.tools.errors import ToolError
from ps.tools.resharding import reshard
from ps.tools.verification import verify
from tests.ps.stored import STATES, data_dirs, expected_arrays, manifest, small_manifest, write_shards

pytestmark = pytest.mark.usefixtures("small_chunks")


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(small_manifest(), ADAM_STATE)


@pytest.fixture
def old(tmp_path: Path, model: Model) -> list[Path]:
    write_shards(tmp_path / "old", model, 2, step=5)
    return data_dirs(tmp_path / "old", 2)


def new(tmp_path: Path, servers: int) -> list[Path]:
    return data_dirs(tmp_path / f"new{servers}", servers)


def snapshot(folders: list[Path]) -> dict[Path, bytes]:
    """Every file of the generations."""
    return {
        file: file.read_bytes() for folder in folders for file in folder.glob("*/generations/**/*") if file.is_file()
    }


def assert_holds(folders: list[Path], model: Model) -> None:
    """That servers would find the model there, and all readers."""
    assert (report := verify(folders)).ok, list(map(str, report.problems))
    group = ps.open_generation(folders)
    for path, tensor in expected_arrays(model).items():
        assert group[path][...].tobytes() == tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), path
    for shard, folder in enumerate(folders):
        with DataDir(folder, shard, len(folders)) as opened:
            store = opened.job_store("gpt")
            header = store.read_header(5)
            assert (header.metadata, header.optimizer.class_name) == ('{"a": 1}', "AdamW")
            for found, expected in zip(store.read_chunks(5), model.chunks(shard, len(folders)), strict=True):
                assert torch.equal(found.weight, expected.weight) and found.state.keys() == expected.state.keys()
                assert all(torch.equal(found.state[name], expected.state[name]) for name in expected.state)


def test_through_any_numbers_of_servers_every_byte_stays(tmp_path):
    model = Model(manifest(bf16=True, small=True), STATES)
    write_shards(tmp_path / "old", model, 2, step=5)
    folders = data_dirs(tmp_path / "old", 2)
    for servers in (3, 1, 4, 2):
        before = snapshot(folders)
        targets = new(tmp_path, servers)
        done = reshard(folders, targets)
        assert (done.filled, done.copied_bytes, done.key.step) == (servers, 0, 5)
        assert snapshot(folders) == before
        folders = targets
    assert_holds(folders, model)
    back = {file.relative_to(tmp_path / "new2"): content for file, content in snapshot(folders).items()}
    source = data_dirs(tmp_path / "old", 2)
    assert back == {file.relative_to(tmp_path / "old"): content for file, content in snapshot(source).items()}


def test_files_are_linked_and_the_source_is_left_alone(old, tmp_path, model):
    before = snapshot(old)
    targets = new(tmp_path, 3)
    reshard(old, targets)
    chunks = [file for folder in targets for file in folder.glob("gpt/generations/*/*/*/c/**/*") if file.is_file()]
    assert chunks and all(file.stat().st_nlink == 2 for file in chunks)
    assert snapshot(old) == before
    assert_holds(targets, model)


def test_a_server_with_several_disks_is_one_source(tmp_path, model):
    disks = [tmp_path / "a0", tmp_path / "a1"]
    for shard, folders in enumerate((disks, [tmp_path / "b"])):
        with DataDir(folders, shard, 2) as opened:
            header = model.header(shard, 2, step=5, optimizer=OptimizerSpec("AdamW", ()), metadata='{"a": 1}')
            opened.job_store("gpt").write(header, model.chunks(shard, 2), model.state_arrays)
    reshard([*disks, tmp_path / "b"], new(tmp_path, 3), move=True)
    assert_holds(new(tmp_path, 3), model)
    assert not any((folder / "gpt").exists() for folder in [*disks, tmp_path / "b"])


def test_tags_come_along(old, tmp_path):
    for shard, folder in enumerate(old):
        JobStore(folder, "gpt", shard, 2).tag(CommitKey(5, "c0"), "best")
    reshard(old, new(tmp_path, 3))
    for shard, folder in enumerate(new(tmp_path, 3)):
        assert JobStore(folder, "gpt", shard, 3).tags() == {"best": CommitKey(5, "c0")}


def test_a_chosen_job_and_step(old, tmp_path, model):
    write_shards(tmp_path / "old", model, 2, step=7)
    write_shards(tmp_path / "old", model, 2, step=9, job="other")
    with pytest.raises(GenerationMissingError, match="several jobs"):
        reshard(old, new(tmp_path, 1))
    reshard(old, new(tmp_path, 1), job="gpt", step=5)
    assert_holds(new(tmp_path, 1), model)
    # One set of servers may have several jobs.
    reshard(old, new(tmp_path, 1), job="other")
    assert verify(new(tmp_path, 1), job="other").generations[0].key.step == 9


def test_generations_of_versions_without_checksums_get_some(old, tmp_path, model):
    for shard, folder in enumerate(old):
        file = folder / f"gpt/generations/00000005/shard-{shard}-of-2.json"
        file.write_text(re.sub(r', "crc32c": \[[\d, ]*\]', "", file.read_text()))
    assert verify(old).generations[0].without_checksum > 0
    reshard(old, new(tmp_path, 3))
    assert verify(new(tmp_path, 3)).generations[0].without_checksum == 0
    assert_holds(new(tmp_path, 3), model)


class TestRefuses:
    """What cannot be begun, with nothing written."""

    def refused(
        self, error: type[Exception], message: str, sources: list[Path], targets: list[Path], **options
    ) -> None:
        before = snapshot([*sources, *targets])
        existed = [folder.exists() for folder in targets]
        with pytest.raises(error, match=message):
            reshard(sources, targets, **options)
        assert snapshot([*sources, *targets]) == before
        assert [folder.exists() for folder in targets] == existed

    def test_an_incomplete_source(self, old, tmp_path):
        self.refused(GenerationMissingError, "Name all data folders of all servers", old[:1], new(tmp_path, 1))
        self.refused(GenerationMissingError, "no generation of step 6", old, new(tmp_path, 1), step=6)

    def test_folders_that_are_the_same_or_in_each_other(self, old, tmp_path):
        link = tmp_path / "link"
        link.symlink_to(old[1])
        for targets in ([old[0]], [old[0] / "new"], [tmp_path / "old"], [link], [old[0] / "gpt/generations/00000005"]):
            self.refused(ToolError, "are the same, or one in the other", old, targets)
        self.refused(ToolError, "are the same, or one in the other", old, [tmp_path / "x", tmp_path / "x"])

    def test_a_target_with_other_things_in_it(self, old, tmp_path):
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "thesis.tex").touch()
        self.refused(ToolError, "not empty: it has 'thesis.tex'", old, [tmp_path / "new"])
        self.refused(ToolError, "is a file", old, [tmp_path / "new" / "thesis.tex"])

    def test_a_target_of_another_shard(self, old, tmp_path):
        DataDir(tmp_path / "b", 1, 2).close()
        self.refused(
            ToolError, "belongs to shard 1/2, and would have to be shard 0/2", old, [tmp_path / "b", tmp_path / "a"]
        )

    def test_a_target_that_has_the_job(self, old, tmp_path, model):
        write_shards(tmp_path / "new1", model, 1, step=5, commit_id="ff")
        self.refused(ToolError, "has job 'gpt' already, at step 5, commit ff", old, new(tmp_path, 1))

    def test_a_target_that_has_an_unreadable_job(self, old, tmp_path, model):
        (path,) = write_shards(tmp_path / "new1", model, 1, step=5)
        (path / "shard-0-of-1.json").unlink()
        self.refused(ToolError, "has job 'gpt' already, with nothing that can be read", old, new(tmp_path, 1))

    def test_a_source_or_target_whose_server_runs(self, old, tmp_path):
        with DataDir(old[1], 1, 2):
            self.refused(DataDirError, f"pid {os.getpid()} is using it; stop that server", old, new(tmp_path, 1))
            named = [old[0] / "gpt", old[1] / "gpt/generations/00000005"]
            self.refused(DataDirError, f"pid {os.getpid()} is using it; stop that server", named, new(tmp_path, 1))
        with DataDir(tmp_path / "new1" / "shard-0", 0, 1):
            self.refused(DataDirError, f"pid {os.getpid()} is using it; stop that server", old, new(tmp_path, 1))


def cannot_link(*_: object, **__: object) -> None:
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


class TestCopies:
    """Where source and target are on different file systems."""

    def test_are_compared(self, old, tmp_path, model, monkeypatch):
        monkeypatch.setattr(os, "link", cannot_link)
        done = reshard(old, new(tmp_path, 3))
        assert done.copied_bytes == verify(old).generations[0].bytes
        assert_holds(new(tmp_path, 3), model)

    def test_a_copy_that_went_wrong_is_found_and_done_again(self, old, tmp_path, model, monkeypatch):
        def copy_wrong(source: Path, target: Path) -> None:
            target.write_bytes(source.read_bytes()[:-1] + b"?")

        with monkeypatch.context() as patch:
            patch.setattr(os, "link", cannot_link)
            patch.setattr(shutil, "copyfile", copy_wrong)
            with pytest.raises(DamagedError, match="not whole, so the source was left as it is.*CRC32C"):
                reshard(old, new(tmp_path, 3), move=True)
        assert_holds(old, model)
        with pytest.raises(DataDirError, match="has not finished filling it with job 'gpt'"):
            DataDir(new(tmp_path, 3)[0], 0, 3)
        for folder in new(tmp_path, 3):
            shutil.rmtree(folder)
        reshard(old, new(tmp_path, 3), move=True)
        assert_holds(new(tmp_path, 3), model)


class TestMove:
    def test_deletes_the_commit_and_only_that(self, old, tmp_path, model):
        write_shards(tmp_path / "old", model, 2, step=4)
        write_shards(tmp_path / "old", model, 2, step=5, job="other")
        done = reshard(old, new(tmp_path, 3), job="gpt", move=True)
        assert done.removed == tuple(folder / "gpt/generations/00000005" for folder in old) and done.left == (4,)
        assert_holds(new(tmp_path, 3), model)
        assert verify(old, job="gpt").generations[0].key.step == 4
        assert verify(old, job="other").ok

    def test_leaves_folders_that_any_server_may_have(self, old, tmp_path, model):
        reshard(old, new(tmp_path, 3), move=True)
        reshard(new(tmp_path, 3), [old[1]], move=True)
        assert_holds([old[1]], model)

    def test_a_damaged_source_is_not_deleted(self, old, tmp_path):
        file = next(file for folder in old for file in folder.glob("gpt/generations/*/weight/up.weight/c/0/0"))
        file.write_bytes(bytes(file.stat().st_size))
        before = snapshot(old)
        with pytest.raises(DamagedError, match="CRC32C"):
            reshard(old, new(tmp_path, 3), move=True)
        assert snapshot(old) == before

    def test_may_be_asked_for_later_and_again(self, old, tmp_path, model):
        reshard(old, new(tmp_path, 3))
        assert len(reshard(old, new(tmp_path, 3), move=True).removed) == 2
        done = reshard(old, new(tmp_path, 3), move=True)
        assert (done.key.step, done.filled, done.removed) == (5, 0, ())
        assert_holds(new(tmp_path, 3), model)


def reshard_and_die(sources: list[Path], targets: list[Path], move: bool, at: int, links: bool) -> None:
    """Kills this process before its `at`-th change of the file system."""
    layout.CHUNK_BYTES = 4 << 10  # As the fixture does for the process that began this one.
    changes = count()

    def deadly(change: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            if next(changes) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments, **options)

        return counted

    if not links:
        os.link = cannot_link
    for name in ("link", "rename", "replace", "unlink", "rmdir", "mkdir", "fsync"):
        setattr(os, name, deadly(getattr(os, name)))
    shutil.copyfile = deadly(shutil.copyfile)
    reshard(sources, targets, move=move)


@pytest.fixture(scope="module")
def forkserver() -> Iterator[multiprocessing.context.ForkServerContext]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ps.tools.resharding", "tests.ps.test_reshard"])
    yield context


@pytest.mark.parametrize("links", [True, False], ids=["links", "copies"])
@pytest.mark.parametrize("move", [False, True], ids=["keep", "move"])
def test_killed_at_any_instant_nothing_is_lost_and_it_goes_on(tmp_path, model, forkserver, move, links):
    write_shards(tmp_path / "original", model, 2, step=5)
    generator = random.Random(17)
    died = 0
    at = 0
    while True:
        trial = tmp_path / str(at)
        shutil.copytree(tmp_path / "original", trial / "old")
        sources, targets = data_dirs(trial / "old", 2), new(trial, 3)
        process = forkserver.Process(target=reshard_and_die, args=(sources, targets, move, at, links))
        process.start()
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0:
            break
        died += 1
        unusable = [folder for folder in targets if refused(folder, targets)]
        with_commit = [s for s, f in enumerate(targets) if JobStore(f, "gpt", s, 3).committed()]
        if not unusable and with_commit:
            assert_holds(targets, model)
        if not move or unusable or not with_commit:
            assert_holds(sources, model)
        reshard(sources, targets, move=move)
        assert_holds(targets, model)
        assert not any(file.name.startswith(".0") for folder in targets for file in folder.rglob("*"))
        if not move:
            assert_holds(sources, model)
        shutil.rmtree(trial)
        at += generator.randint(1, 70)
    assert died > 3
    assert_holds(targets, model)


def refused(folder: Path, targets: list[Path]) -> bool:
    """Whether a server would not start with a folder; where there is none, it would begin anew."""
    return folder.exists() and unfinished.find(folder) is not None


def test_a_server_does_not_start_with_a_folder_that_is_not_finished(tmp_path):
    DataDir(tmp_path, 0, 2).close()
    unfinished.put(tmp_path, unfinished.Mark("gpt", "reshard"))
    with pytest.raises(
        DataDirError, match="'zero-ps reshard' has not finished filling it with job 'gpt'; run that again"
    ):
        DataDir(tmp_path, 0, 2)
    unfinished.clear(tmp_path)
    DataDir(tmp_path, 0, 2).close()


class TestCommand:
    def test_says_how_to_start_the_servers(self, old, tmp_path, capsys):
        targets = new(tmp_path, 3)
        assert main(["reshard", "--from", *map(str, old), "--to", *map(str, targets), "--move"]) == 0
        out = capsys.readouterr().out
        assert "job 'gpt', step 5, commit c0, in 3 folders: all files linked" in out
        assert f"removed {old[0]}/gpt/generations/00000005" in out
        assert f"zero-ps serve --shard 2/3 --data-dir {targets[2]}" in out

    def test_exit_status(self, old, tmp_path, capsys, monkeypatch):
        assert main(["reshard", "--from", str(old[0]), "--to", str(tmp_path / "x")]) == 2
        assert capsys.readouterr().err.startswith("zero-ps reshard: no generation is complete")

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "link", full)
        assert main(["reshard", "--from", *map(str, old), "--to", str(tmp_path / "x")]) == 1
        assert "the disk of" in capsys.readouterr().err
