"""The disk cannot read a commit: an error that says which file and what to do, and the commit before is good."""

import errno
import shutil
from pathlib import Path

import pytest
import torch

import trainer
from ps import LocalCluster
from tests.faulty_disk import faulty_disk
from tests.models import Residual, seeded, train


def large() -> torch.nn.Module:
    return Residual(vocabulary=701, width=200, layers=1)  # Four tensors that are spilled, of 0.5 to 0.64 MB.


def join(job: trainer.Job, seed: int = 0) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = trainer.offload(seeded(large, seed), job)
    return model, trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)


def readable(file: Path) -> bool:
    try:
        file.read_bytes()
    except OSError as error:
        assert error.errno == errno.EIO
        return False
    return True


@pytest.mark.parametrize("memory", [None, "8MiB"], ids=["in memory", "spilled"])
def test_a_commit_that_cannot_be_read_names_the_file_and_the_one_before_goes_on(
    tmp_path: Path, memory: str | None
) -> None:
    plain = seeded(large)
    expected = train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True), range(5))
    with faulty_disk(tmp_path, 256) as disk, LocalCluster(1, data_dir=disk.folder / "data", memory=memory) as cluster:
        with trainer.connect(cluster.addresses) as job:
            model, optimizer = join(job)
            losses = train(model, optimizer, range(2))
            job.commit()
            train(model, optimizer, range(2, 4))
            job.commit()
        cluster.kill(0)
        generations = cluster.data_dirs[0] / "default/generations"
        newest = [file for file in (generations / "00000004").glob("*/*/c/*/*") if file.stat().st_size > 1 << 18]
        lost = max(newest, key=disk.begin_of)
        shutil.rmtree(cluster.data_dirs[0] / "default/working", ignore_errors=True)
        disk.lose(lost)
        # The end of another file may lie behind the beginning of this one.
        unreadable = [str(file) for file in newest if not readable(file)]
        assert str(lost) in unreadable

        cluster.restart(0)
        with pytest.raises(trainer.ServerFailure) as failed, trainer.connect(cluster.addresses) as job:
            model, optimizer = join(job, seed=9)
            # The second step for optimizer state, which only the update of the first one reads.
            train(model, optimizer, range(4, 6))
        message = str(failed.value)
        assert any(file in message for file in unreadable) and "Input/output error" in message
        assert "from a copy" in message and "move" in message

        (generations / "00000004").rename(disk.folder / "lost")
        with trainer.connect(cluster.addresses) as job:
            assert job.step == 2
            model, optimizer = join(job, seed=9)
            losses += train(model, optimizer, range(2, 5))
            assert job.commit().step == 5
    assert losses == expected
