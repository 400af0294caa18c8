"""A step that is committed again: at any instant the old generation, the new one or both can be restored."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ps.store import ChunkState, CommitKey, DataDir, GenerationMissingError, JobStore, StoredParameter, StoreError
from ps.store.testing import Model

ROOT = Path(__file__).parents[2]
MODEL = Model([StoredParameter("w", (5,), torch.float32, "parameter", True)], {})


def key(name: str) -> CommitKey:
    """'2a' is commit a of step 2."""
    return CommitKey(int(name[:-1]), name[-1])


def write(store: JobStore, *names: str) -> None:
    """Generations with a number of their own as every value."""
    for name in names:
        weight = torch.full((5,), float(int(name, 16)))
        store.write(MODEL.header(step=key(name).step, commit_id=name[-1]), [ChunkState(0, 0, weight)], {})


def committed(store: JobStore) -> list[str]:
    """What is listed, after having read all of it."""
    names = [f"{key.step}{key.commit_id}" for key in store.committed()]
    for name in names:
        (chunk,) = store.read_chunks(key(name).step, name[-1])
        assert (chunk.weight == int(name, 16)).all()
        assert store.read_header(key(name).step, name[-1]).key == key(name)
    return names


def folders(store_dir: Path) -> set[str]:
    return {path.name for path in (store_dir / "gpt/generations").iterdir()}


def test_a_replaced_generation_stays_and_is_found_by_its_commit(tmp_path):
    store = JobStore(tmp_path, "gpt", 0, 1)
    write(store, "1a", "2b", "2c", "2d")
    assert committed(store) == ["1a", "2b", "2c", "2d"]
    assert store.committed_steps() == [1, 2]
    assert store.read_header(2).key == key("2d")
    assert folders(tmp_path) == {"00000001", "00000002", ".00000002.replaced-1", ".00000002.replaced-2"}
    write(store, "2b")
    assert committed(store) == ["1a", "2b", "2c", "2d"], "a commit that is there is left as it is"
    with pytest.raises(GenerationMissingError, match=r"step 2, commit e, in .*it has 1, 2"):
        store.read_chunks(2, "e")


@pytest.mark.parametrize(
    ("written", "complete", "current", "left"),
    [
        ("2a 2b", "2a", "2b", "2a 2b"),  # b may not be on all servers yet
        ("2a 2b", "2b", "2b", "2b"),
        ("1a 2a 2b", "1a", "2b", "1a 2a 2b"),
        ("2a 2b 2c", "2a", "2c", "2a 2c"),  # b was tried and given up
        ("2a 2b", "2a", "2a", "2a"),  # a was restored, so b was abandoned
        ("2a 2b 3c", "2a", "3c", "2a 3c"),
        ("2a 2b 3c", "3c", "3c", "2b 3c"),
        ("1a 2b 3c 3d", "2b", "3d", "1a 2b 3c 3d"),
        ("2a 2b 3c", "3d", "3c", "2a 2b 3c"),  # not here: nothing is known
    ],
)
def test_prune_deletes_replaced_generations_once_something_newer_is_complete(
    tmp_path, written, complete, current, left
):
    store = JobStore(tmp_path, "gpt", 0, 1)
    write(store, *written.split())
    deleted = store.prune(keep=9, complete=key(complete), current=key(current))
    assert committed(store) == left.split()
    assert {f"{key.step}{key.commit_id}" for key in deleted} == set(written.split()) - set(left.split())
    in_place = {name for name in folders(tmp_path) if not name.startswith(".")}
    assert in_place == {f"{key(name).step:08d}" for name in left.split()}


def test_discard_after_takes_replaced_generations_with_it(tmp_path):
    store = JobStore(tmp_path, "gpt", 0, 1)
    write(store, "1a", "2b", "2c", "3d", "3e")
    assert store.discard_after(1) == [3, 2]
    assert folders(tmp_path) == {"00000001"}


def test_a_generation_that_cannot_be_put_in_place_leaves_the_old_one_there(tmp_path, monkeypatch):
    store = JobStore(tmp_path, "gpt", 0, 1)
    write(store, "2a")
    rename = os.rename

    def failing(source, target):
        if ".tmp-" in str(source):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(StoreError, match="Input/output error"):
        write(store, "2b")
    assert committed(store) == ["2a"]
    assert folders(tmp_path) == {"00000002"}


def test_a_generation_whose_commit_cannot_be_read_is_listed_without_it(tmp_path, caplog):
    store = JobStore(tmp_path, "gpt", 0, 1)
    write(store, "1a", "2b")
    file = tmp_path / "gpt/generations/00000002/zarr.json"
    file.write_text("{}")
    assert store.committed() == [key("1a"), CommitKey(2, "")]
    assert str(file) in caplog.text
    write(store, "2c")
    assert store.committed() == [key("1a"), CommitKey(2, ""), key("2c")]


# Commits step 2 again after a restore of step 1, deletes the abandoned step 3, and then what commit c of
# step 2 supersedes. Kills itself just before its n-th rename.
SCRIPT = """
import os, signal, sys
from pathlib import Path
from tests.ps.test_store_replace import DataDir, key, write
store = DataDir(Path(sys.argv[1]), 0, 1).job_store("gpt")
write(store, "1a", "2b", "3a")
rename, left = os.rename, int(sys.argv[2])
def dying(source, target):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    rename(source, target)
os.rename = dying
write(store, "2c")
store.discard_after(2)
store.prune(keep=1, complete=key("1a"), current=key("2c"))
store.prune(keep=1, complete=key("2c"), current=key("2c"))
assert left == 0, left
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("renames", "left"),
    [
        (0, ["1a", "2b", "3a"]),
        (1, ["1a", "2b", "3a"]),  # 2b is set aside, 2c not in place yet
        (2, ["1a", "2b", "2c", "3a"]),
        (3, ["1a", "2b", "2c"]),
        (4, ["2b", "2c"]),
        (5, ["2c"]),
    ],
)
def test_a_server_killed_while_it_replaces_a_generation_has_the_old_or_the_new(tmp_path, renames, left):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(renames)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    with DataDir(tmp_path, 0, 1) as data_dir:
        store = data_dir.job_store("gpt")
        assert committed(store) == left, "before anything was cleaned up"
        store.clean()
        assert committed(store) == left
        in_place = {name for name in folders(tmp_path) if not name.startswith(".")}
        assert in_place == {f"{step:08d}" for step in store.committed_steps()}
        assert not [name for name in folders(tmp_path) if ".tmp-" in name]
        write(store, "2d")
        assert committed(store) == sorted([*left, "2d"])
