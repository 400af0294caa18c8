"""Committed state outlives every process, and anybody can read it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import trainer
from ps import LocalCluster
from tests.models import Residual, seeded, train
from tests.ranks import run_ranks, start_rank
from tests.trainer.runs import gathered_values


def test_a_run_whose_processes_were_all_killed_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    model = seeded(Residual)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    expected = train(model, optimizer, range(15))
    with LocalCluster(servers=2, data_dir=tmp_path) as cluster:
        # Goes on stepping after the commit, until it is killed.
        process = start_rank(
            "trainer.runs:steps_of_adamw",
            cluster.addresses,
            0,
            1,
            tmp_path / "result.pt",
            job="gpt",
            steps=1_000_000,
            commit_at=5,
            stay=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "committed\n"
        for server in range(2):
            cluster.kill(server)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for server in range(2):
            cluster.restart(server)
        result = run_ranks("trainer.runs:steps_of_adamw", cluster.addresses, 1, job="gpt", steps=10)[0]
    assert result["started_at"] == 5
    assert result["metadata"] == {"seen": 5}
    assert result["losses"] == expected[5:]
    for name, param in model.named_parameters():
        assert torch.equal(result["params"][name], param), name


def test_a_trainer_that_was_killed_is_replaced_by_one_that_goes_on_from_the_servers_memory(
    cluster: LocalCluster, job_name: str
) -> None:
    model = seeded(Residual)
    expected = train(model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True), range(6))
    parts = [run_ranks("trainer.runs:steps_of_adamw", cluster.addresses, 1, job=job_name, steps=3)[0] for _ in range(2)]
    assert [part["started_at"] for part in parts] == [0, 3]
    assert parts[0]["losses"] + parts[1]["losses"] == expected


def test_the_number_of_trainers_may_change_between_runs(cluster: LocalCluster, job_name: str) -> None:
    first = run_ranks("trainer.runs:steps_of_adamw", cluster.addresses, 2, job=job_name, steps=2)
    second = run_ranks("trainer.runs:steps_of_adamw", cluster.addresses, 1, job=job_name, steps=2)
    assert [first[0]["started_at"], second[0]["started_at"]] == [0, 2]


READER = """
import sys, numpy, zarr
group = zarr.open_group(sys.argv[1], mode="r")
numpy.savez(sys.argv[2], **{name: array[...] for name, array in group["weight"].arrays()})
"""


def test_the_union_of_the_servers_folders_is_one_zarr_group_with_the_model(tmp_path: Path) -> None:
    import numpy

    large = {"vocabulary": 3001, "width": 700, "layers": 1}
    with LocalCluster(servers=2, data_dir=tmp_path / "state") as cluster:
        with trainer.connect(cluster.addresses, job="gpt") as job:
            with job.init():
                model = seeded(lambda: Residual(**large))
            trainer.offload(model, job)
            optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)
            train(model, optimizer, range(2))
            job.commit()
            expected = gathered_values(model)
        for folder in cluster.data_dirs:
            generation = Path(folder) / "gpt" / "generations" / "00000002"
            shutil.copytree(generation, tmp_path / "union", dirs_exist_ok=True)
    # In a process that has never heard of zero-ps.
    subprocess.run([sys.executable, "-c", READER, tmp_path / "union", tmp_path / "all.npz"], check=True, cwd=tmp_path)
    with numpy.load(tmp_path / "all.npz") as arrays:
        assert set(arrays) == set(expected)
        for name, value in expected.items():
            assert arrays[name].shape == tuple(value.shape), name
            assert torch.equal(torch.from_numpy(arrays[name]), value), name


def test_buffers_are_part_of_a_commit(tmp_path: Path) -> None:
    def make() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 1))

    def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, which: range) -> list[float]:
        losses = []
        for step in which:
            torch.manual_seed(step)
            loss = model(torch.randn(8, 6)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    plain = seeded(make)
    expected = steps(plain, torch.optim.SGD(plain.parameters(), lr=0.1, fused=True), range(6))
    losses: list[float] = []
    with LocalCluster(servers=2, data_dir=tmp_path) as cluster:
        for part in (range(3), range(3, 6)):
            with trainer.connect(cluster.addresses) as job:
                assert job.step == part.start
                with job.init():
                    model = seeded(make, seed=part.start)
                trainer.offload(model, job)
                optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
                losses += steps(model, optimizer, part)
                job.commit()
            for server in range(2):
                cluster.kill(server)
                cluster.restart(server)
        with trainer.connect(cluster.addresses) as job:
            model = trainer.offload(seeded(make, seed=9), job)
            assert torch.equal(model[1].running_var, plain[1].running_var)
            assert model[1].num_batches_tracked.item() == 6
    assert losses == expected


def test_only_the_newest_commits_are_kept(tmp_path: Path) -> None:
    with LocalCluster(servers=1, data_dir=tmp_path) as cluster, trainer.connect(cluster.addresses) as job:
        model = trainer.offload(seeded(Residual), job)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        for step in range(4):
            train(model, optimizer, [step])
            job.commit()
        kept = sorted(os.listdir(Path(cluster.data_dirs[0]) / "default" / "generations"))
    assert kept == ["00000003", "00000004"]


def test_the_metadata_of_a_repeated_commit_counts(tmp_path: Path) -> None:
    with LocalCluster(servers=2, data_dir=tmp_path) as cluster:
        with trainer.connect(cluster.addresses) as job:
            trainer.offload(seeded(Residual), job)
            job.commit({"a": 1})
            job.commit({"a": 2})
        for server in range(2):
            cluster.kill(server)
            cluster.restart(server)
        with trainer.connect(cluster.addresses) as job:
            assert job.metadata == {"a": 2}


def test_servers_whose_memory_differs_go_back_to_the_commit_that_both_have(tmp_path: Path) -> None:
    with LocalCluster(servers=2, data_dir=tmp_path) as cluster:
        with trainer.connect(cluster.addresses) as job:
            model = trainer.offload(seeded(Residual), job)
            optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
            train(model, optimizer, range(2))
            job.commit()
            expected = gathered_values(model)
            train(model, optimizer, range(2, 4))
        cluster.kill(1)
        cluster.restart(1)
        with trainer.connect(cluster.addresses) as job:
            assert job.step == 2
            model = trainer.offload(seeded(Residual, seed=5), job)
            for name, value in gathered_values(model).items():
                assert torch.equal(value, expected[name]), name


def test_a_trainer_says_what_is_wrong_when_a_server_dies(tmp_path: Path) -> None:
    with LocalCluster(servers=2, data_dir=tmp_path) as cluster, trainer.connect(cluster.addresses) as job:
        model = trainer.offload(seeded(Residual), job)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        train(model, optimizer, range(1))
        cluster.kill(1)
        began = time.monotonic()
        with pytest.raises(trainer.ConnectError, match=cluster.addresses[1]):
            train(model, optimizer, range(1, 5))
        assert time.monotonic() - began < 20


def test_a_server_that_stalls_costs_no_lease_on_the_others() -> None:
    with LocalCluster(servers=2, lease=3) as cluster, trainer.connect(cluster.addresses) as job:
        model = trainer.offload(seeded(Residual), job)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        train(model, optimizer, range(1))
        os.kill(cluster.pid(1), signal.SIGSTOP)
        time.sleep(5)
        os.kill(cluster.pid(1), signal.SIGCONT)
        train(model, optimizer, range(1, 3))
        assert job.step == 3


def test_servers_that_lost_what_was_never_committed_say_what_to_do() -> None:
    with LocalCluster(servers=2) as cluster:
        with trainer.connect(cluster.addresses) as job:
            trainer.offload(seeded(Residual), job)
        cluster.kill(1)
        cluster.restart(1)
        with pytest.raises(trainer.ConnectError, match="Nothing was committed yet: restart the other servers"):
            trainer.connect(cluster.addresses)
        cluster.kill(0)
        cluster.restart(0)
        with trainer.connect(cluster.addresses) as job:
            trainer.offload(seeded(Residual), job)
