"""The disk fills up under a commit: an error that says so, training goes on, and commits again once there is room."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import trainer
from ps import LocalCluster
from ps.store import ChunkState, DiskFullError, JobStore, StoredParameter
from ps.store.testing import ADAM_STATE, Model
from tests.models import Residual, seeded, train

MIB = 1 << 20


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory) -> Iterator[Path]:
    """A file system of 96 MiB. Mounting needs root."""
    folder = tmp_path_factory.mktemp("small")
    mount = ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def filled(folder: Path, leave: int) -> Iterator[None]:
    """All but some bytes of a disk are taken."""
    file = folder / "filler"
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    with file.open("wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, max(1, free - leave))
    try:
        yield
    finally:
        file.unlink()


def large() -> torch.nn.Module:
    return Residual(vocabulary=701, width=400, layers=1)  # 1.9 MB, so commits of some 6 MB on two servers


def test_training_goes_on_and_commits_again_once_there_is_room(small_disk: Path) -> None:
    plain = seeded(large)
    expected = train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True), range(8))
    losses: list[float] = []
    with LocalCluster(servers=2, data_dir=small_disk / "data") as cluster:
        with trainer.connect(cluster.addresses) as job:
            with job.init():
                model = seeded(large)
            trainer.offload(model, job)
            optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)
            losses += train(model, optimizer, range(2))
            job.commit({"seen": 2})
            losses += train(model, optimizer, range(2, 3))
            with filled(small_disk, MIB):
                full = r"cannot write generation \d of job 'default': the disk of .* is full .* free some space"
                with pytest.raises(trainer.ServerFailure, match=full):
                    job.commit()
                losses += train(model, optimizer, range(3, 5))
                job.commit(wait=False)
                with pytest.raises(trainer.ServerFailure, match=full):
                    job.commit()
                for folder in cluster.data_dirs:
                    assert [p.name for p in (folder / "default/generations").iterdir()] == ["00000002"]
            losses += train(model, optimizer, range(5, 6))
            job.commit({"seen": 6})
        for server in range(2):
            cluster.kill(server)
            cluster.restart(server)
        with trainer.connect(cluster.addresses) as job:
            assert (job.step, job.metadata) == (6, {"seen": 6})
            model = trainer.offload(seeded(large, seed=9), job)
            optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)
            losses += train(model, optimizer, range(6, 8))
    assert losses == expected


@pytest.mark.parametrize("leave", [0, 16 << 10, 64 << 10, MIB, 4 * MIB, 9 * MIB])
def test_whatever_does_not_fit_leaves_the_generation_before_and_nothing_else(small_disk: Path, leave: int) -> None:
    """From no room for a folder to no room for the last chunks. Then there is room, and it is written."""
    model = Model(
        [StoredParameter(f"w{i}", (250, 1000), torch.float32, "parameter", True) for i in range(4)], ADAM_STATE
    )
    root = small_disk / f"left-{leave}"
    store = JobStore([root / "a", root / "b"], "gpt", 0, 1)
    store.write(model.header(step=1), model.chunks(), ADAM_STATE)
    with filled(small_disk, leave):
        for step in (1, 2):
            with pytest.raises(DiskFullError, match="committed generations are untouched, so free some space"):
                store.write(model.header(step=step, commit_id="a"), model.chunks(), ADAM_STATE)
            assert [(key.step, key.commit_id) for key in store.committed()] == [(1, "0")]
        for folder in (root / "a", root / "b"):
            assert [p.name for p in (folder / "gpt/generations").iterdir()] == ["00000001"]
    store.write(model.header(step=2), model.chunks(), ADAM_STATE)
    read: list[ChunkState] = list(store.read_chunks(2))
    assert all(torch.equal(r.weight, w.weight) for r, w in zip(read, model.chunks(), strict=True))
    for path in sorted(root.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
