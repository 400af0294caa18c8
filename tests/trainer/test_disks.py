"""Disks that are slow, that become read-only, that hand back other bits: the last good commit stays usable."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import trainer
from ps import LocalCluster
from ps.tools.verification import verify
from tests.models import Residual, seeded, train
from tests.slow_disk import slow_disk


def joins(job: trainer.Job) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    with job.init():
        model = seeded(Residual)
    trainer.offload(model, job)
    return model, trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)


def plain_losses(steps: int) -> list[float]:
    model = seeded(Residual)
    return train(model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True), range(steps))


def test_a_slow_disk_holds_up_commits_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_disk(tmp_path, 0.03, monkeypatch)
    with LocalCluster(1, data_dir=tmp_path / "data", lease=2) as cluster:
        monkeypatch.undo()
        with trainer.connect(cluster.addresses, job="job") as job:
            built = joins(job)
            losses = train(*built, range(1))
            began = time.monotonic()
            commit = job.commit(wait=False)
            while not commit.done():
                losses += train(*built, [job.step])
            seconds, steps = time.monotonic() - began, len(losses)
            # Longer than the lease, which the trainer keeps, and than many steps.
            commit.wait()
            assert seconds > 1 and steps > 3, (seconds, steps)
            assert losses == plain_losses(steps)
        # It leaves in order, with what was done since.
        cluster.stop(0)
        report = verify([cluster.data_dirs[0]], job="job")
        assert report.ok and report.generations[0].key.step == steps, report


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """The folder is on a file system that is mounted read-only. Modes would not stop root."""
    binding = ["mount", "--bind", str(folder), str(folder)]
    if os.getuid() != 0 or subprocess.run(binding, check=False, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a folder")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True, capture_output=True)
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_becomes_read_only_fails_commits_and_training_goes_on(tmp_path: Path) -> None:
    with LocalCluster(1, data_dir=tmp_path) as cluster, trainer.connect(cluster.addresses) as job:
        built = joins(job)
        losses = train(*built, range(2))
        job.commit()
        with read_only(cluster.data_dirs[0] / "default" / "generations"):
            losses += train(*built, range(2, 4))
            with pytest.raises(trainer.ServerFailure, match="Read-only file system"):
                job.commit()
            losses += train(*built, range(4, 5))
            report = verify([cluster.data_dirs[0]])
            assert report.ok and report.generations[0].key.step == 2
        job.commit()
        assert losses == plain_losses(5)
        report = verify([cluster.data_dirs[0]])
        assert report.ok and report.generations[0].key.step == 5


def test_a_server_that_stops_when_its_disk_is_read_only_says_so_and_the_last_commit_stays(tmp_path: Path) -> None:
    with LocalCluster(1, data_dir=tmp_path) as cluster:
        with trainer.connect(cluster.addresses) as job:
            built = joins(job)
            train(*built, range(2))
            job.commit()
            train(*built, range(2, 3))
        with read_only(cluster.data_dirs[0] / "default" / "generations"):
            cluster.stop(0)
        assert "job 'default' is not committed: " in cluster.log(0) and "Read-only file system" in cluster.log(0)
        cluster.restart(0)
        with trainer.connect(cluster.addresses) as job:
            assert job.step == 2
            assert train(*joins(job), range(2, 4)) == plain_losses(4)[2:]


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [_flip, _cut])
def test_a_damaged_chunk_file_is_named_and_the_commit_before_goes_on(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    with LocalCluster(1, data_dir=tmp_path) as cluster:
        with trainer.connect(cluster.addresses) as job:
            built = joins(job)
            for step in range(2):
                train(*built, [step])
                job.commit()
        cluster.kill(0)
        generations = cluster.data_dirs[0] / "default" / "generations"
        victim = max((generations / "00000002" / "weight").rglob("c/*/*"), key=lambda path: path.stat().st_size)
        damage(victim)
        cluster.restart(0)
        with pytest.raises(trainer.ServerFailure, match="00000002") as raised:
            trainer.connect(cluster.addresses)
        assert victim.parent.parent.parent.name in str(raised.value)
        (generations / "00000002").rename(tmp_path / "damaged")
        with trainer.connect(cluster.addresses) as job:
            assert job.step == 1
            assert train(*joins(job), range(1, 3)) == plain_losses(3)[1:]
