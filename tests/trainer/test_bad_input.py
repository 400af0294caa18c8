"""What people get wrong: an error within seconds that says what to do."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
import torch
from torch import nn

import trainer
from protos import zero_ps_pb2 as pb
from protos import zero_ps_pb2_grpc as pb_grpc
from ps import LocalCluster
from tests.models import Residual, seeded
from tests.ps.client import Client
from tests.ranks import run_ranks


@contextmanager
def within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_server_that_is_not_there_is_named_within_the_connect_timeout() -> None:
    address = f"127.0.0.1:{free_port()}"
    with within(12), pytest.raises(trainer.ConnectError, match=f"{address} after 2 s.*zero-ps serve"):
        trainer.connect(address, connect_timeout=2)


def test_something_else_that_listens_is_no_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with within(12), pytest.raises(trainer.ConnectError, match=address):
            trainer.connect(address, connect_timeout=2)


@pytest.mark.parametrize(
    "address",
    ["nonsense", "host:", ":70", "host:0", "host:99999", "", "a:1,a:1", "::1:7070", "http://a:70", [], None, [7]],
)
def test_addresses_that_are_none_are_refused(address: Any) -> None:
    with pytest.raises(trainer.ConfigError, match="address"):
        trainer.connect(address)


def test_an_incomplete_or_repeated_set_of_servers_is_refused(cluster: LocalCluster) -> None:
    with pytest.raises(trainer.ConnectError, match=r"1 server address\(es\) were given, but .* is shard 0/2"):
        trainer.connect(cluster.addresses[:1])
    port = cluster.addresses[0].rpartition(":")[2]
    with pytest.raises(trainer.ConnectError, match="two servers hold the same shard"):
        trainer.connect([cluster.addresses[0], f"localhost:{port}"])


@pytest.mark.parametrize(
    "arguments",
    [
        {"rank": 1},
        {"rank": 2, "world_size": 2},
        {"rank": 0, "world_size": 0},
        {"links": ["pigeon"]},
        {"links": []},
        {"connect_timeout": float("nan")},
        {"timeout": -1},
        {"job": None},
    ],
)
def test_arguments_that_cannot_work_are_refused(cluster: LocalCluster, arguments: dict) -> None:
    with pytest.raises(trainer.ConfigError):
        trainer.connect(cluster.addresses, **arguments)


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "x" * 101])
def test_job_names_that_are_no_folder_names_are_refused(cluster: LocalCluster, name: str) -> None:
    with pytest.raises(trainer.ConfigError, match="job name"):
        trainer.connect(cluster.addresses, job=name)


def test_another_model_is_refused_by_the_first_parameter_that_differs(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        trainer.offload(seeded(Residual), job)
    for model, named in [
        (Residual(width=26), "embedding.weight"),
        (Residual(layers=3), "blocks.2."),
        (Residual(layers=1), "blocks.1."),
    ]:
        with trainer.connect(cluster.addresses, job=job_name) as job:
            with pytest.raises(trainer.JobMismatch, match=named):
                trainer.offload(model, job)
            # The model is as it was.
            assert model.embedding.weight.sum().isfinite()


def test_trainers_that_disagree_on_the_world_size_are_told(cluster: LocalCluster, job_name: str) -> None:
    with within(60):
        texts = run_ranks("trainer.runs:wrong_world_size", cluster.addresses, 2, job=job_name, sizes=[2, 3])
    assert any("disagree on world size" in text and "2" in text and "3" in text for text in texts), texts


def test_a_trainer_that_one_server_refuses_leaves_the_others(cluster: LocalCluster, job_name: str) -> None:
    other = Client(cluster.addresses[0], job=job_name, rank=1, world_size=3, num_shards=2, group=1)
    # A sign of life while the new trainer waits for it, which tells that it is no former group.
    alive = threading.Timer(1.0, other.call, ["Heartbeat"])
    alive.start()
    try:
        refused = pytest.raises(trainer.ZeroPsError, match="disagree on world size: rank 1 says 3")
        with within(15), refused:
            trainer.connect(cluster.addresses, job=job_name, rank=0, world_size=2)
        with grpc.insecure_channel(cluster.addresses[1]) as channel:
            jobs = pb_grpc.ParameterServerStub(channel).Status(pb.StatusRequest(), timeout=20).jobs
        # At once, and not when the lease ends.
        assert not [session for found in jobs if found.name == job_name for session in found.sessions]
    finally:
        alive.join()
        other.close()


class Homemade(torch.optim.SGD):
    pass


@pytest.mark.parametrize(
    "cls", [torch.optim.LBFGS, torch.optim.Muon, torch.optim.SparseAdam, torch.optim.Adafactor, Homemade]
)
def test_an_optimizer_that_servers_do_not_run_is_refused(cluster: LocalCluster, job_name: str, cls: type) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(seeded(Residual), job)
        with pytest.raises(trainer.ConfigError, match=cls.__name__):
            trainer.RemoteOptimizer(model.parameters(), cls, lr=0.1)


def test_another_optimizer_than_the_jobs_is_refused(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(seeded(Residual), job)
        trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        with pytest.raises(trainer.JobMismatch, match="SGD.*AdamW|AdamW.*SGD"):
            trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW)


def test_parameters_that_have_no_values_are_refused_by_name(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        lazy = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
        with pytest.raises(trainer.ConfigError, match=r"'1\.weight' is not initialised"):
            trainer.offload(lazy, job)
        with torch.device("meta"):
            meta = nn.Sequential(nn.Linear(2, 2))
        with pytest.raises(trainer.ConfigError, match=r"'0\.weight' is on the meta device"):
            trainer.offload(meta, job)


def test_dtypes_that_cannot_be_stored_are_refused_by_name(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = nn.Module()
        model.wave = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
        with pytest.raises(trainer.ConfigError, match="'wave'.*complex64"):
            trainer.offload(model, job)


def test_a_released_parameter_that_is_used_outside_of_a_pass_says_how(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(seeded(Residual), job)
        with pytest.raises(trainer.ReleasedParameterError, match=r"'head\.weight' is released.*trainer\.gathered"):
            model.head.weight * 2
        # What is known without the values can be asked.
        weight = model.head.weight
        assert (weight.shape, weight.numel(), weight.dtype) == ((101, 24), 2424, torch.float32)
        assert "head.weight" in repr(weight)


def test_calls_in_the_wrong_order_say_the_right_one(cluster: LocalCluster, job_name: str) -> None:
    with pytest.raises(trainer.ConfigError, match="RemoteOptimizer"):
        trainer.RemoteOptimizer(seeded(Residual).parameters(), torch.optim.SGD, lr=0.1)
    job = trainer.connect(cluster.addresses, job=job_name)
    with pytest.raises(trainer.ConfigError, match="offload"):
        job.commit()
    model = trainer.offload(seeded(Residual), job)
    with pytest.raises(trainer.ConfigError, match="already"):
        trainer.offload(model, job)
    optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(trainer.ConfigError, match="closure"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(trainer.ConfigError, match="JSON"):
        job.commit({"x": object()})
    job.close()
    with pytest.raises(trainer.ConfigError, match="closed"):
        job.commit()


def test_a_name_that_does_not_resolve_says_so() -> None:
    with within(12), pytest.raises(trainer.ConnectError, match="nosuchhost.invalid:7070: the name does not resolve"):
        trainer.connect("nosuchhost.invalid:7070", connect_timeout=1)
