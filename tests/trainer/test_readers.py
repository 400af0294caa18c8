"""Read-only connections: another process looks at a job's model and leaves no trace in it."""

import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import trainer
from protos import zero_ps_pb2 as pb
from ps import LocalCluster
from trainer.server import Server


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


def test_what_a_reader_cannot_do_names_that_it_is_one(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        trainer.offload(nn.Linear(5, 3), job)
        with trainer.connect(cluster.addresses, job=job_name, read_only=True) as reading:
            model = trainer.offload(nn.Linear(5, 3), reading)
            refused = pytest.raises(trainer.ConfigError, match="opened with read_only=True, and gathered.modify=True. ")
            with refused, trainer.gathered(model, modify=True):
                pass


def test_a_reader_of_a_job_that_went_on_is_told_so_and_goes_on_itself(cluster: LocalCluster, job_name: str) -> None:
    x = torch.ones(1, 5)
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(nn.Linear(5, 3), job)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        reading = trainer.connect(cluster.addresses, job=job_name, read_only=True)
        reader = trainer.offload(nn.Linear(5, 3), reading, trainer.OffloadConfig(param_persistence_threshold=0))
        for step in range(2):
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                expected = model(x)
            if step == 0:
                gone = pytest.raises(trainer.RequestRefused, match=r"is gone: .*A reader goes on .* job.recover\(\)")
                with gone, torch.no_grad():
                    reader(x)
            for _ in range(2):
                with reading.recovering(), torch.no_grad():
                    found = reader(x)
            assert torch.equal(found, expected) and reading.step == step + 1
        reading.close()


def test_a_reader_that_comes_while_a_step_is_made_waits_for_it(cluster: LocalCluster, job_name: str) -> None:
    """One server has made the step, and the other one is about to."""
    x = torch.ones(1, 5)
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(nn.Linear(5, 3), job)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        model(x).sum().backward()
        job.transfer.flush()
        groups = optimizer._encoded_groups()

        def ask(server: Server) -> None:
            server.call("Step", pb.StepRequest(session_id=server.session_id, groups=groups), 20)

        ask(job.servers[1])
        with trainer.connect(cluster.addresses, job=job_name, read_only=True) as reading:
            assert reading.step == 1
            reader = trainer.offload(nn.Linear(5, 3), reading)
            later = threading.Timer(0.5, ask, [job.servers[0]])
            later.start()
            with torch.no_grad():
                found = reader(x)
        later.join()
        # What was asked for once is not made twice.
        optimizer.step()
        with torch.no_grad():
            assert torch.equal(found, model(x))
