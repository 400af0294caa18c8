"""What every link does, through the nccl link's classes, with sockets in place of NCCL (`tests.links.stand_in`)."""

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import trainer
from protos import pair
from ps import LocalCluster
from tests.links import stand_in
from tests.links.conformance import TIMEOUT, LinkConformance, Peer
from tests.trainer.runs import gathered_values
from trainer.links import Pull, Push, PushKind


@pytest.fixture(scope="module", autouse=True)
def _sockets_in_place_of_nccl() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        stand_in.patch(monkeypatch)
        yield


class TestNcclLink(LinkConformance):
    kind = "nccl"
    lends = True
    prelude = "import pytest, tests.links.stand_in\ntests.links.stand_in.patch(pytest.MonkeyPatch())"

    @classmethod
    def start(cls, **options: Any) -> LocalCluster:
        return LocalCluster(1, device="cuda:0", **options)


class TestNcclLinkOnTheDevice(TestNcclLink):
    """The trainer's memory is the device's."""

    prelude = f"{TestNcclLink.prelude}\ntests.links.stand_in.patch_device(pytest.MonkeyPatch())"

    @pytest.fixture(autouse=True)
    def _device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stand_in.patch_device(monkeypatch)


@pytest.fixture(scope="module")
def servers() -> Iterator[LocalCluster]:
    with LocalCluster(2, device="cuda:0") as cluster:
        yield cluster


def _train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(3):
        x = torch.randn(4, 600, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("on_device", [False, True])
def test_training_equals_plain_torch(
    servers: LocalCluster, job_name: str, monkeypatch: pytest.MonkeyPatch, on_device: bool
) -> None:
    def new() -> torch.nn.Module:
        torch.manual_seed(1)
        return torch.nn.Sequential(torch.nn.Linear(600, 3000), torch.nn.GELU(), torch.nn.Linear(3000, 600))

    if on_device:
        stand_in.patch_device(monkeypatch)
    plain = new()
    _train(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    with trainer.connect(servers.addresses, job=job_name, links=["nccl"]) as job:
        assert (job.device == torch.device("cpu")) == on_device
        # Everything leaves and comes back, over and over.
        config = trainer.OffloadConfig(param_persistence_threshold=0, max_reuse_distance=0, prefetch_bucket_size=1)
        model = trainer.offload(new(), job, config)
        _train(model, trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1))
        values = gathered_values(model)
    for name, value in plain.named_parameters():
        assert torch.equal(values[name], value), name


def test_memory_is_read_and_written_when_the_device_has_come_so_far(job_name: str) -> None:
    """What comes behind waits, too; the server is not kept waiting for what the device has not computed."""
    size = 3_000_000
    with (
        LocalCluster(1, device="cuda:0") as cluster,
        Peer(cluster.addresses[0], "nccl", job_name, {"w": torch.ones(size)}) as peer,
    ):
        reached = threading.Event()
        after = (SimpleNamespace(query=reached.is_set),)
        gradient, target, behind = torch.zeros(size), torch.zeros(size), torch.zeros(size)
        chunks, sources = peer._chunks(0, gradient)
        push = peer.link.push(Push(PushKind.GRADIENT, 0, chunks, sources, torch.float32, after=after))
        chunks, destinations = peer._chunks(0, target)
        pull = peer.link.pull(Pull(0, chunks, destinations, torch.float32, TIMEOUT, after=after))
        last = peer.start_pull(0, behind)
        with pytest.raises(TimeoutError):
            last.result(0.5)
        gradient.fill_(2)
        assert (target == 0).all() and not push.done()
        reached.set()
        for future in (push, pull, last):
            future.result(TIMEOUT)
        assert (target == 1).all() and (behind == 1).all()
        peer.step(0)
        assert (peer.pull(0, version=1) == -1).all()
        # One that never comes holds up nobody who closes the link.
        never = peer.link.pull(
            Pull(1, *peer._chunks(0, target), torch.float32, TIMEOUT, after=(SimpleNamespace(query=bool),))
        )
        peer.link.close()
        assert isinstance(never.exception(TIMEOUT), trainer.ConnectError)


def test_a_push_that_has_to_wait_for_its_version_waits_longer_than_a_parcel_may_take(
    job_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server takes none of it before: there is no room here for all of it, and that is no error."""
    size = 12_000_000
    monkeypatch.setattr(pair, "MOVE_SECONDS", 1.0)
    with (
        LocalCluster(1, device="cuda:0") as cluster,
        Peer(cluster.addresses[0], "nccl", job_name, {"w": torch.zeros(size)}) as peer,
    ):
        early = peer.push(0, torch.full((size,), 3.0), kind=PushKind.WEIGHT, step=1)
        with pytest.raises(TimeoutError):
            early.result(2.5)
        peer.step(0)
        early.result(TIMEOUT)
        assert (peer.pull(0, version=1) == 3).all()


def test_a_trainer_recovers_from_a_lost_server(job_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.patch_device(monkeypatch)
    with (
        LocalCluster(1, device="cuda:0") as cluster,
        trainer.connect(cluster.addresses, job=job_name, links=["nccl"], timeout=60) as job,
    ):
        model = trainer.offload(torch.nn.Linear(600, 600, bias=False), job)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=1.0)
        before = gathered_values(model)["weight"]
        job.commit()
        lost = False
        while job.step < 2:
            with job.recovering(timeout=60):
                model(torch.ones(1, 600)).sum().backward()
                if job.step == 1 and not lost:
                    lost = True
                    cluster.restart(0)
                optimizer.step()
                optimizer.zero_grad()
        assert lost and job.links[0].kind == "nccl"
        assert torch.equal(gathered_values(model)["weight"], before - 1 - 1)
