"""From the folders that a person names to the newest commit that is complete over them."""

import json
import re
import shutil
from pathlib import Path

import pytest

from ps.store import DamagedError, GenerationMissingError
from ps.store.generation_set import find_generation
from ps.store.testing import ADAM_STATE, Model
from tests.ps.stored import data_dirs, small_manifest, unite, write_shards

pytestmark = pytest.mark.usefixtures("small_chunks")


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(small_manifest(), ADAM_STATE)


@pytest.fixture
def dirs(tmp_path: Path, model: Model) -> list[Path]:
    write_shards(tmp_path, model, 2, step=5)
    return data_dirs(tmp_path, 2)


def test_names_the_parts_of_every_server_in_whatever_order_the_folders_come(dirs):
    for folders in (dirs, dirs[::-1]):
        found = find_generation(folders)
        assert (found.key.step, found.key.commit_id, found.header.job) == (5, "c0", "gpt")
        assert {(part.shard, part.path.parents[2]) for part in found.parts} == set(enumerate(dirs))
    weight = found.arrays["weight/up.weight"]
    assert {found.part_with(weight, chunk).shard for chunk in range(2)} == {0, 1}
    assert found.part_with(found.arrays["exp_avg/up.weight"], 1) is found.part_with(weight, 1)


@pytest.mark.parametrize(
    "named",
    [
        lambda folder: folder,
        lambda folder: folder / "gpt",
        lambda folder: folder / "gpt/generations/00000005",
    ],
    ids=["data folder", "job folder", "generation"],
)
def test_folders_are_data_folders_or_jobs_or_generations(dirs, named):
    found = find_generation([named(dirs[0]), dirs[1], dirs[1]])
    assert len(found.parts) == 2


def test_folders_copied_over_each_other_are_one_folder_with_all_parts(dirs, tmp_path):
    union = unite([folder / "gpt/generations/00000005" for folder in dirs], tmp_path / "union")
    found = find_generation([union])
    assert [part.shard for part in found.parts] == [0, 1]


def test_takes_the_newest_step_that_all_have(dirs, tmp_path, model):
    write_shards(tmp_path, model, 2, step=6, commit_id="c6")
    write_shards(tmp_path, model, 2, step=7, commit_id="c7")
    shutil.rmtree(dirs[1] / "gpt/generations/00000007")
    assert find_generation(dirs).key.step == 6
    assert find_generation(dirs, step=5).key.step == 5
    with pytest.raises(GenerationMissingError, match=r"no generation of step 7 is complete.*shard-1 has shard 1/2"):
        find_generation(dirs, step=7)


def test_does_not_put_commits_of_one_step_together(tmp_path, model):
    for shard, commit_id in ((0, "aa"), (1, "bb")):
        write_shards(tmp_path / commit_id, model, 2, commit_id=commit_id)
        shutil.move(data_dirs(tmp_path / commit_id, 2)[shard], tmp_path / f"shard-{shard}")
    with pytest.raises(GenerationMissingError, match="no generation is complete"):
        find_generation(data_dirs(tmp_path, 2))


def test_takes_a_replaced_commit_where_not_all_servers_have_the_newer_one(dirs, tmp_path, model):
    write_shards(tmp_path, model, 2, commit_id="d0")
    assert find_generation(dirs).key.commit_id == "d0"
    generations = dirs[1] / "gpt/generations"
    shutil.rmtree(generations / "00000005")
    assert find_generation(dirs).key.commit_id == "c0"
    (generations / ".00000005.replaced-1").rename(generations / "00000005")
    assert find_generation(dirs).key.commit_id == "c0"


def test_asks_which_job_where_there_are_several(dirs, tmp_path, model):
    write_shards(tmp_path, model, 2, step=9, job="other")
    with pytest.raises(GenerationMissingError, match=r"several jobs here, 'gpt', 'other'; choose one with --job"):
        find_generation(dirs)
    assert find_generation(dirs, job="gpt").key.step == 5
    assert find_generation([dirs[0] / "other", dirs[1]], job="other").key.step == 9
    with pytest.raises(GenerationMissingError, match="they have none"):
        find_generation(dirs, job="third")


def test_a_server_that_was_not_named_is_missed(dirs):
    with pytest.raises(GenerationMissingError, match=r"shard-0 has shard 0/2 at step 5.*all data folders"):
        find_generation(dirs[:1])


def test_two_copies_of_a_server_are_refused(dirs, tmp_path):
    shutil.copytree(dirs[0], tmp_path / "copy")
    with pytest.raises(DamagedError, match=r"chunk 0 of .* is both in .*; name one copy"):
        find_generation([*dirs, tmp_path / "copy"])


def test_a_folder_that_is_nothing_is_named(tmp_path):
    with pytest.raises(GenerationMissingError, match=re.escape(f"{tmp_path} holds no generation")):
        find_generation([tmp_path])
    with pytest.raises(GenerationMissingError, match="none: No such file or directory; check the name"):
        find_generation([tmp_path / "none"])


def test_metadata_that_differs_between_servers_is_damage(dirs):
    file = dirs[1] / "gpt/generations/00000005/zarr.json"
    file.write_text(file.read_text().replace("AdamW", "SGD"))
    with pytest.raises(DamagedError, match=r"zarr.json differs from .*zarr.json"):
        find_generation(dirs)


@pytest.mark.parametrize("name", ["zarr.json", "shard-1-of-2.json"])
def test_a_newer_commit_that_cannot_be_read_is_not_passed_over(dirs, tmp_path, model, name):
    write_shards(tmp_path, model, 2, step=6)
    (dirs[1] / "gpt/generations/00000006" / name).unlink()
    with pytest.raises(DamagedError, match=f"00000006.*{name[:5]}"):
        find_generation(dirs)
    assert find_generation(dirs, step=5).key.step == 5


def test_a_list_of_chunks_that_lacks_one_is_not_complete(dirs):
    for shard in range(2):
        file = dirs[shard] / f"gpt/generations/00000005/shard-{shard}-of-2.json"
        document = json.loads(file.read_text())
        document["arrays"].pop("buffer/count", None)
        file.write_text(json.dumps(document))
    with pytest.raises(GenerationMissingError, match="chunk 0 of buffer/count of step 5, commit c0 is in none of"):
        find_generation(dirs)
