"""Read-only connections: another process looks at a job's model and leaves no trace in it."""

from pathlib import Path

import pytest
import torch
from torch import nn

import trainer
from ps import LocalCluster


def test_a_reader_computes_with_the_weights_of_a_job_that_is_training(cluster: LocalCluster, job_name: str) -> None:
    torch.manual_seed(0)
    job = trainer.connect(cluster.addresses, job=job_name)
    model = trainer.offload(nn.Linear(5, 3), job)
    optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    x = torch.randn(2, 5)
    model(x).sum().backward()
    optimizer.step()
    reading = trainer.connect(cluster.addresses, job=job_name, read_only=True)
    reader = trainer.offload(nn.Linear(5, 3), reading)
    with torch.no_grad():
        assert torch.equal(reader(x), model(x))
    assert reading.step == job.step == 1
    reading.close()
    optimizer.zero_grad()
    model(x).sum().backward()
    optimizer.step()
    job.commit()
    job.close()


def test_a_reader_has_servers_load_a_commit_that_nobody_uses(tmp_path: Path) -> None:
    x = torch.ones(1, 5)
    with LocalCluster(2, data_dir=tmp_path) as cluster:
        job = trainer.connect(cluster.addresses)
        model = trainer.offload(nn.Linear(5, 3), job)
        with torch.no_grad():
            expected = model(x)
        job.commit({"epoch": 7})
        job.close()
    with LocalCluster(2, data_dir=tmp_path) as cluster:
        job = trainer.connect(cluster.addresses, read_only=True)
        assert job.metadata == {"epoch": 7}
        with torch.no_grad():
            assert torch.equal(trainer.offload(nn.Linear(5, 3), job)(x), expected)
        job.close()


def test_a_reader_of_a_job_that_does_not_exist_is_refused(cluster: LocalCluster, job_name: str) -> None:
    with pytest.raises(trainer.RequestRefused, match=f"there is no job '{job_name}'"):
        trainer.connect(cluster.addresses, job=job_name, read_only=True)
