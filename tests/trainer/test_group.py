"""Group mode: trainers that each pull and push a part get the same as trainers that move everything."""

import re
from pathlib import Path

import pytest
import torch

from ps import LocalCluster
from tests.ranks import run_ranks


def run(function: str, cluster: LocalCluster, store: Path, ranks: int, **arguments):
    return run_ranks(
        f"trainer.group_runs:{function}", cluster.addresses, ranks, store=str(store / function), **arguments
    )


@pytest.mark.parametrize(
    ("ranks", "options"),
    [(2, {}), (3, {"param_dtype": "bfloat16"}), (2, {"limited": True})],
    ids=["two", "three in bf16", "limited"],
)
def test_both_modes_give_the_same_bits(
    cluster: LocalCluster, job_name: str, tmp_path: Path, ranks: int, options: dict[str, object]
) -> None:
    results = {}
    for mode in ("direct", "group"):
        folder = tmp_path / mode
        folder.mkdir()
        results[mode] = run("train", cluster, folder, ranks, job=f"{job_name}-{mode}", mode=mode, **options)
        assert [result["mode"] for result in results[mode]] == [mode] * ranks
    for direct, group in zip(results["direct"], results["group"], strict=True):
        assert direct["losses"] == group["losses"]
        for name, value in direct["params"].items():
            assert torch.equal(value, group["params"][name]), name
    if not options:
        # What one trainer alone would pull is divided among them.
        pulled = [sum(result["moved"][0] for result in results[mode]) for mode in ("direct", "group")]
        assert pulled[1] == pytest.approx(pulled[0] / ranks, rel=0.1)


def test_micro_batches_add_up(cluster: LocalCluster, job_name: str, tmp_path: Path) -> None:
    """Ranks are added first and micro-batches then, where direct mode does it the other way round."""
    results = {}
    for mode in ("direct", "group"):
        folder = tmp_path / mode
        folder.mkdir()
        results[mode] = run("train", cluster, folder, 2, job=f"{job_name}-{mode}", mode=mode, micro_batches=2)
    for name, value in results["direct"][0]["params"].items():
        torch.testing.assert_close(results["group"][0]["params"][name], value, rtol=1e-3, atol=1e-5)


def test_ranks_on_different_ways_hear_of_it(cluster: LocalCluster, job_name: str, tmp_path: Path) -> None:
    errors = run("take_different_ways", cluster, tmp_path, 2, job=job_name)
    for error in errors:
        assert error.startswith("ConfigError: the trainers took different ways: ")
        assert "ways.0" in error and "ways.1" in error and "mode='direct'" in error


@pytest.mark.parametrize(
    ("modes", "world", "link", "expected"),
    [
        (["auto", "auto"], True, "grpc", "group"),
        (["auto", "auto"], True, "shm", "direct"),
        (["auto", "direct"], True, "grpc", "direct"),
        (["auto", "auto"], False, "grpc", "direct"),
        (["group", "group"], False, "grpc", "ConfigError: .*torch.distributed is not initialised"),
        (["group", "group"], True, "shm", "group"),
    ],
)
def test_all_ranks_come_to_one_mode(
    cluster: LocalCluster, job_name: str, tmp_path: Path, modes: list[str], world: bool, link: str, expected: str
) -> None:
    found = run("choose", cluster, tmp_path, 2, job=job_name, modes=modes, world=world, link=link)
    assert all(re.match(expected, mode) for mode in found), found


def test_a_group_may_be_a_part_of_the_world_with_a_job_of_its_own(
    cluster: LocalCluster, job_name: str, tmp_path: Path
) -> None:
    """As with tensor parallelism: four ranks, of whom two and two have the same parameters."""
    results = {}
    for mode in ("direct", "auto"):
        folder = tmp_path / mode
        folder.mkdir()
        results[mode] = run("train_in_a_part_of_the_world", cluster, folder, 4, job=f"{job_name}-{mode}", mode=mode)
    assert [result["mode"] for result in results["auto"]] == ["group"] * 4
    for direct, group in zip(results["direct"], results["auto"], strict=True):
        assert direct["losses"] == group["losses"]
        assert _flat(direct["params"]) == _flat(group["params"])
    # Ranks 0 and 2 are one group, 1 and 3 are the other.
    assert _flat(results["auto"][0]["params"]) == _flat(results["auto"][2]["params"])
    assert results["auto"][0]["params"]["head.weight"].shape != results["auto"][1]["params"]["head.weight"].shape


def test_a_group_of_other_ranks_than_the_jobs_is_refused(cluster: LocalCluster, job_name: str, tmp_path: Path) -> None:
    for errors in run("give_a_group_that_is_not_the_jobs", cluster, tmp_path, 2, job=job_name):
        for error, said in zip(
            errors, ("is not in the process group", "this is rank 0 of 1 in the process group", "not 'dp'"), strict=True
        ):
            assert error.startswith("ConfigError: ") and said in error, error


def test_updates_begin_during_the_last_backward(cluster: LocalCluster, job_name: str, tmp_path: Path) -> None:
    """Chunks of parts of several ranks, and those that one rank alone has, are updated before the step is asked for."""
    results = {}
    for early in (False, True):
        folder = tmp_path / str(early)
        folder.mkdir()
        results[early] = run("announce", cluster, folder, 2, job=f"{job_name}-{early}", early=early)
    for plain, early in zip(results[False], results[True], strict=True):
        assert early["updated"] == ["wide.weight", "wide.bias", "last.weight", "last.bias"]
        assert _flat(plain["params"]) == _flat(early["params"])


def test_averages_and_state_dicts_are_those_of_direct_mode(
    cluster: LocalCluster, job_name: str, tmp_path: Path
) -> None:
    results = {}
    for mode in ("direct", "group"):
        folder = tmp_path / mode
        folder.mkdir()
        results[mode] = run("look_and_load", cluster, folder, 2, job=f"{job_name}-{mode}", mode=mode)
    for direct, group in zip(results["direct"], results["group"], strict=True):
        assert direct["losses"][-1] == direct["losses"][-2]
        assert _flat(direct) == _flat(group)


def _flat(values: object, prefix: str = "") -> dict[str, object]:
    if isinstance(values, dict):
        return {key: value for name, each in values.items() for key, value in _flat(each, f"{prefix}.{name}").items()}
    return {prefix: values.tolist() if isinstance(values, torch.Tensor) else values}
