"""A server with several data folders: its generations are whole over all of them, whatever instant it is killed at."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zarr

from ps.store import ChunkState, CommitKey, DamagedError, DataDir, DataDirError, JobStore, StoredParameter, StoreError
from ps.store.disks import spread
from ps.store.testing import ADAM_STATE, Model

ROOT = Path(__file__).parents[2]
MODEL = Model(
    [
        StoredParameter("w", (4501, 700), torch.float32, "parameter", True),
        StoredParameter("b", (5,), torch.float32, "parameter", True),
        StoredParameter("mask", (3, 3), torch.bool, "buffer", False),
    ],
    ADAM_STATE,
)


def dirs(root: Path, disks: int = 2) -> list[Path]:
    return [root / f"disk-{disk}" for disk in range(disks)]


def write(store: JobStore, step: int, chunks=None) -> Path:
    return store.write(MODEL.header(step=step), MODEL.chunks() if chunks is None else chunks, ADAM_STATE).path


def same(store: JobStore, step: int) -> bool:
    read = {(chunk.parameter, chunk.chunk): chunk for chunk in store.read_chunks(step)}
    return len(read) == len(list(MODEL.chunks())) and all(
        torch.equal(read[chunk.parameter, chunk.chunk].weight, chunk.weight)
        and all(torch.equal(read[chunk.parameter, chunk.chunk].state[n], t) for n, t in chunk.state.items())
        for chunk in MODEL.chunks()
    )


def chunk_files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "/c" in str(p.relative_to(folder))}


def test_chunks_are_spread_by_bytes_and_always_alike() -> None:
    shapes = [(40_000, 1000), (7,), (), (3, 0), (9000, 500), (2_000_000,)]
    for disks in (1, 2, 3):
        places = spread(shapes, 1, 2, disks)
        assert places == spread(shapes, 1, 2, disks)
        sizes = [sum(1 for disk in places.values() if disk == d) for d in range(disks)]
        assert max(sizes) - min(sizes) <= 2 and sum(sizes) == len(places)


def test_every_folder_describes_the_model_and_their_union_is_it(tmp_path: Path) -> None:
    store = JobStore(dirs(tmp_path), "gpt", 0, 1)
    write(store, 3)
    parts = [folder / "gpt/generations/00000003" for folder in dirs(tmp_path)]
    held = [chunk_files(part) for part in parts]
    assert all(held) and not held[0] & held[1]
    documents = [{str(p.relative_to(part)): p.read_bytes() for p in part.rglob("zarr.json")} for part in parts]
    assert documents[0] == documents[1]
    assert same(store, 3) and store.committed() == [CommitKey(3, "0")]
    for part in parts:
        shutil.copytree(part, tmp_path / "whole", dirs_exist_ok=True)
    group = zarr.open_group(tmp_path / "whole", mode="r")
    for path, tensor in (("weight/w", MODEL.values[0]), ("exp_avg/w", MODEL.states[0]["exp_avg"])):
        assert torch.equal(torch.from_numpy(group[path][...]), tensor)


def test_the_order_of_the_folders_does_not_matter(tmp_path: Path) -> None:
    with DataDir(dirs(tmp_path, 3), 0, 1) as data_dir:
        write(data_dir.job_store("gpt"), 1)
    for order in ([2, 0, 1], [1, 2, 0]):
        with DataDir([dirs(tmp_path, 3)[disk] for disk in order], 0, 1) as data_dir:
            assert list(data_dir.paths) == dirs(tmp_path, 3)
            assert data_dir.jobs() == ["gpt"] and same(data_dir.job_store("gpt"), 1)
    assert same(JobStore(dirs(tmp_path, 3)[::-1], "gpt", 0, 1), 1)


def test_a_folder_may_be_added_and_none_left_out(tmp_path: Path) -> None:
    first, second, third = dirs(tmp_path, 3)
    with DataDir(first, 0, 1) as data_dir:
        write(data_dir.job_store("gpt"), 1)
    assert json.loads((first / "zero-ps.json").read_text()) == {"format": 1, "shard": 0, "num_shards": 1}
    with DataDir([second, first], 0, 1) as data_dir:
        assert data_dir.paths == (first, second)
        store = data_dir.job_store("gpt")
        assert same(store, 1)
        write(store, 2, store.chunk_files(1))
        assert chunk_files(second / "gpt/generations/00000002"), "some chunks moved"
        assert same(store, 1) and same(store, 2)
    claims = [json.loads((folder / "zero-ps.json").read_text()) for folder in (first, second)]
    assert [(claim["format"], claim["disk"], claim["disks"]) for claim in claims] == [(2, 0, 2), (2, 1, 2)]
    for left in (first, second):
        with pytest.raises(DataDirError, match=r"it is disk . of 2 of this server, and disk . was not named; name all"):
            DataDir(left, 0, 1)
    with pytest.raises(DataDirError, match="was not named"):
        DataDir([first, third], 0, 1)
    (third / "zero-ps.json").unlink(missing_ok=True)
    # As a crash leaves it between the claims of a new folder and of those that were there.
    (third / "zero-ps.json").write_text(json.dumps({"format": 2, "shard": 0, "num_shards": 1, "disk": 2, "disks": 3}))
    with DataDir([first, second], 0, 1):
        pass
    with DataDir([first, second, third], 0, 1) as data_dir:
        assert same(data_dir.job_store("gpt"), 2)


def test_folders_of_two_servers_are_refused(tmp_path: Path) -> None:
    first, second = dirs(tmp_path)
    for folder in (first, second):
        DataDir(folder, 0, 1).close()
    with pytest.raises(DataDirError, match="both are disk 0 of a server"):
        DataDir([first, second], 0, 1)
    with pytest.raises(DataDirError, match="is using it"):
        DataDir([first, first], 0, 1)


def test_a_generation_whose_part_is_gone_is_not_passed_over(tmp_path: Path, caplog) -> None:
    store = JobStore(dirs(tmp_path), "gpt", 0, 1)
    write(store, 1)
    write(store, 2)
    shutil.rmtree(tmp_path / "disk-1/gpt/generations/00000002")
    store.clean()
    assert store.committed() == [CommitKey(1, "0"), CommitKey(2, "")]
    assert "00000002 lacks what was on disk 1 of 2 of shard 0/1; name all --data-dir of this server" in caplog.text
    with pytest.raises(DamagedError, match="lacks what was on disk 1 of 2"):
        store.read_chunks(2)
    assert same(store, 1)


def test_parts_of_different_commits_are_not_put_together(tmp_path: Path) -> None:
    store = JobStore(dirs(tmp_path), "gpt", 0, 1)
    write(store, 1)
    file = tmp_path / "disk-1/gpt/generations/00000001/zarr.json"
    file.write_text(file.read_text().replace('"commit_id": "0"', '"commit_id": "1"'))
    assert store.committed() == [CommitKey(1, "")]


def test_a_disk_that_refuses_the_rename_leaves_the_old_generation(tmp_path: Path, monkeypatch) -> None:
    store = JobStore(dirs(tmp_path), "gpt", 0, 1)
    write(store, 1)
    rename = os.rename

    def failing(source, target):
        if "disk-1" in str(source) and ".tmp-" in str(source):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    for step in (1, 2):
        with pytest.raises(StoreError, match="Input/output error"):
            store.write(MODEL.header(step=step, commit_id="a"), MODEL.chunks(), ADAM_STATE)
        assert store.committed() == [CommitKey(1, "0")] and same(store, 1)
    for folder in dirs(tmp_path):
        assert [p.name for p in (folder / "gpt/generations").iterdir()] == ["00000001"]


# ---------------------------------------------------------------- killed at every rename

SMALL = Model([StoredParameter(f"p{i}", (5,), torch.float32, "parameter", True) for i in range(4)], {})


def key(name: str) -> CommitKey:
    """'2a' is commit a of step 2."""
    return CommitKey(int(name[:-1]), name[-1])


def write_small(store: JobStore, name: str, tag: str = "") -> None:
    """A generation with a number of its own as every value."""
    chunks = [ChunkState(i, 0, torch.full((5,), float(int(name, 16)))) for i in range(4)]
    store.write(SMALL.header(step=key(name).step, commit_id=name[-1]), chunks, {}, tag=tag)


def committed(store: JobStore) -> list[str]:
    """What is listed, after having read all of it; '2' is a commit of step 2 that cannot be read."""
    for found in store.committed():
        if found.commit_id:
            values = [chunk.weight for chunk in store.read_chunks(found.step, found.commit_id)]
            assert len(values) == 4
            assert all((value == int(f"{found.step}{found.commit_id}", 16)).all() for value in values)
    return [f"{found.step}{found.commit_id}" for found in store.committed()]


# A new step, a step committed again, an abandoned step that is deleted and one that is tagged, and what is
# superseded. A child kills itself just before its n-th rename, for every n, and notes before how far it got.
SCRIPT = """
import itertools, os, signal, sys
from pathlib import Path
from tests.ps.test_store_disks import DataDir, dirs, key, write_small
rename = os.rename
def run(root, left):
    root.mkdir()
    def dying(source, target):
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        rename(source, target)
    os.rename = dying
    say = (root / "said").write_text
    store = DataDir(dirs(root), 0, 1).job_store("gpt")
    write_small(store, "1a"); say("1a")
    write_small(store, "2b"); say("1a 2b")
    write_small(store, "3a"); say("1a 2b 3a")
    write_small(store, "4a", tag="best"); say("1a 2b 3a 4a")
    write_small(store, "2c"); say("1a 2b 2c 3a 4a")
    store.discard_after(2); say("1a 2b 2c")
    store.prune(keep=1, complete=key("1a"), current=key("2c")); say("1a 2b 2c")
    store.prune(keep=1, complete=key("2c"), current=key("2c")); say("2c")
for renames in itertools.count():
    # Forked before there are threads: a child in a process of its own would take seconds to start.
    child = os.fork()
    if child == 0:
        try:
            run(Path(sys.argv[1]) / f"{renames:03d}", renames)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(3)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status != signal.SIGKILL:
        sys.exit(os.waitstatus_to_exitcode(status))
"""

# What may be there after a crash on the way from one line of the script to the next.
BETWEEN = {
    "1a 2b 2c 3a 4a": ["1a 2b 2c 3a 4a", "1a 2b 2c 3a", "1a 2b 2c"],
    "1a 2b 2c": ["1a 2b 2c", "2b 2c", "2c"],
}


def test_a_server_killed_at_any_rename_has_the_old_or_the_new(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    states = ["", "1a", "1a 2b", "1a 2b 3a", "1a 2b 3a 4a", "1a 2b 2c 3a 4a", "1a 2b 2c", "2c"]
    roots = sorted(tmp_path.iterdir())
    assert len(roots) > 18
    for root in roots:
        last = (root / "said").read_text() if (root / "said").exists() else ""
        allowed = {last, *states[states.index(last) : states.index(last) + 2], *BETWEEN.get(last, [])}
        with DataDir(dirs(root), 0, 1) as data_dir:
            store = data_dir.job_store("gpt")
            store.clean()
            left = " ".join(committed(store))
            assert left in allowed, (root, last, left)
            for folder in dirs(root):
                generations = folder / "gpt/generations"
                names = [p.name for p in generations.iterdir()] if generations.exists() else []
                assert not [name for name in names if ".tmp-" in name]
            if "4a" in last or "2c" in last:
                assert store.tags() == {"best": key("4a")}, (root, last, left)
            write_small(store, "5e")
            assert committed(store)[-1] == "5e"


# ---------------------------------------------------------------- tags


def test_a_tagged_generation_stays_until_it_is_untagged(tmp_path: Path) -> None:
    store = JobStore(dirs(tmp_path), "gpt", 0, 1)
    write_small(store, "1a", tag="best")
    for name in ("2a", "3a", "4a"):
        write_small(store, name)
        store.prune(keep=1, complete=key(name), current=key(name))
    assert committed(store) == ["1a", "4a"] and store.tags() == {"best": key("1a")}
    assert store.untag("best") == [key("1a")] and store.untag("best") == []
    store.prune(keep=1, complete=key("4a"), current=key("4a"))
    assert committed(store) == ["4a"] and store.tags() == {}


def test_a_tag_moves_to_the_next_generation_that_gets_it_once_all_servers_have_that(tmp_path: Path) -> None:
    store = JobStore(dirs(tmp_path), "gpt", 0, 1)
    for name in ("1a", "2a", "3a"):
        write_small(store, name, tag="best")
    assert store.tags() == {"best": key("3a")}
    store.prune(keep=1, complete=key("2a"), current=key("3a"))
    assert committed(store) == ["2a", "3a"], "until then the older one is kept"
    store.prune(keep=1, complete=key("3a"), current=key("3a"))
    assert committed(store) == ["3a"]


def test_a_generation_can_be_tagged_later(tmp_path: Path) -> None:
    store = JobStore(tmp_path, "gpt", 0, 1)
    write_small(store, "1a")
    store.tag(key("1a"), "first")
    store.tag(key("1a"), "first")
    write_small(store, "2a")
    store.prune(keep=1, complete=key("2a"), current=key("2a"))
    assert committed(store) == ["1a", "2a"]


@pytest.mark.parametrize("tag", ["", "../x", "a/b", ".hidden", "a b", "ä", "x" * 101])
def test_a_tag_is_a_plain_name(tmp_path: Path, tag: str) -> None:
    store = JobStore(tmp_path, "gpt", 0, 1)
    write_small(store, "1a")
    for call in (lambda: store.tag(key("1a"), tag), lambda: store.untag(tag)):
        with pytest.raises(ValueError, match=rf"tag {re.escape(repr(tag))} is not valid"):
            call()
    if tag:
        with pytest.raises(ValueError, match="is not valid"):
            write_small(store, "2a", tag=tag)


@pytest.mark.parametrize("disks", [1, 2])
def test_a_tagged_generation_of_an_abandoned_run_is_kept_and_not_gone_on_from(tmp_path: Path, disks: int) -> None:
    store = JobStore(dirs(tmp_path, disks), "gpt", 0, 1)
    write_small(store, "1a")
    write_small(store, "3a", tag="best")
    write_small(store, "2b")
    store.discard_after(2)
    assert committed(store) == ["1a", "2b"] and store.tags() == {"best": key("3a")}
    for folder in dirs(tmp_path, disks):
        assert (folder / "gpt/generations/.00000003.abandoned-1").is_dir()
    store.clean()
    store.prune(keep=1, complete=key("2b"), current=key("2b"))
    assert store.tags() == {"best": key("3a")}
    # The new run gets as far, and has a better one.
    write_small(store, "3c", tag="best")
    assert store.tags() == {"best": key("3c")}
    store.prune(keep=1, complete=key("3c"), current=key("3c"))
    assert committed(store) == ["3c"]
    for folder in dirs(tmp_path, disks):
        assert [p.name for p in (folder / "gpt/generations").iterdir()] == ["00000003"]


def test_an_abandoned_generation_goes_with_its_last_tag(tmp_path: Path) -> None:
    store = JobStore(dirs(tmp_path), "gpt", 0, 1)
    write_small(store, "3a", tag="best")
    store.tag(key("3a"), "also")
    write_small(store, "2b")
    store.discard_after(2)
    store.untag("best")
    assert store.tags() == {"also": key("3a")}
    store.untag("also")
    assert store.tags() == {}
    for folder in dirs(tmp_path):
        assert [p.name for p in (folder / "gpt/generations").iterdir()] == ["00000002"]
