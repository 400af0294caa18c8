"""Servers are lost under a trainer that recovers: it ends with the bits of an undisturbed run."""

import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from torch import nn

import trainer
import trainer.optimizer
import trainer.server
from protos import zero_ps_pb2 as pb
from protos import zero_ps_pb2_grpc as pb_grpc
from ps import LocalCluster
from tests.models import Residual, batch, loss_of, seeded
from tests.ranks import start_rank
from tests.trainer.recovery.programs import Plain, adamw
from tests.trainer.runs import gathered_values

STEPS = 6
LEASE = 3.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(servers=2, lease=LEASE) as cluster:
        yield cluster


def restart(cluster: LocalCluster, servers: list[int]) -> None:
    for server in servers:
        cluster.kill(server)
    for server in servers:
        cluster.restart(server)


class Disturbed:
    """Trains, with something happening once at a place of step 3. Every loss is that of the undisturbed run."""

    def __init__(
        self,
        cluster: LocalCluster,
        job: str,
        place: str,
        disturb: Callable[[], None],
        make: Callable[[], nn.Module] = Residual,
    ) -> None:
        self.rewinds: list[int] = []
        self.lost: list[trainer.ZeroPsError] = []
        self._place, self._disturb = place, disturb
        self._plain = Plain(make=make).train_to(STEPS)
        with (
            pytest.MonkeyPatch.context() as patch,
            trainer.connect(cluster.addresses, job=job, timeout=60) as connection,
        ):
            self.job = connection
            self.model = trainer.offload(seeded(make), connection)
            self.optimizer = adamw(self.model)
            self._hook(self.model.blocks[1])
            patch.setattr(trainer.optimizer, "call_all", self._call_all)
            connection.commit()
            while connection.step < STEPS:
                with connection.recovering(on_rewind=self.rewinds.append, on_lost=self.lost.append, timeout=60):
                    self._step(connection.step)
            self._plain.check(gathered_values(self.model))
        assert not self._place, "it was disturbed"

    def _call_all(self, servers: Any, method: str, request: Any, timeout: float) -> Any:
        if method == "Step" and self._place.startswith("after the step of server "):
            first = servers[int(self._place[-1])]
            if self.job.step == 3:
                first.call(method, request(first), timeout)
            self._at(self._place)
        return trainer.server.call_all(servers, method, request, timeout)

    def _step(self, step: int) -> None:
        if step == 2 and self.job.complete != (2, self.job.complete[1]):
            self.job.commit()
        loss = loss_of(self.model, batch(step))
        assert loss.item() == self._plain.losses[step][0]
        loss.backward()
        self._at("before step")
        self.optimizer.step()
        self._at("after step")
        self.optimizer.zero_grad()

    def _hook(self, module: nn.Module) -> None:
        module.register_forward_hook(lambda *_: self._at("forward"))
        module.up.weight.register_hook(lambda *_: self._at("backward"))

    def _at(self, place: str) -> None:
        if place == self._place and self.job.step >= 3:
            self._place = ""
            self._disturb()


@pytest.mark.parametrize(
    ("place", "victims"), [("forward", [1]), ("backward", [0]), ("before step", [0, 1]), ("after step", [1])]
)
def test_a_server_killed_under_a_step_is_waited_for_and_costs_no_bit(
    cluster: LocalCluster, job_name: str, place: str, victims: list[int]
) -> None:
    run = Disturbed(cluster, job_name, place, lambda: restart(cluster, victims))
    # Nothing but the commits has survived.
    assert run.rewinds == [2]
    assert len(run.lost) == 1


@pytest.mark.parametrize("stepped", [0, 1])
def test_a_server_killed_between_the_calls_of_one_step_costs_no_bit(
    cluster: LocalCluster, job_name: str, stepped: int
) -> None:
    """One server has made the step, the other has not heard of it and is started anew."""
    run = Disturbed(cluster, job_name, f"after the step of server {stepped}", lambda: restart(cluster, [1 - stepped]))
    assert run.rewinds == [2]
    assert len(run.lost) == 1


def test_a_server_that_is_stopped_for_longer_than_leases_and_pings_goes_on_from_its_memory(
    cluster: LocalCluster, job_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The product waits for 12 s.
    sooner = {"grpc.keepalive_time_ms": 500, "grpc.keepalive_timeout_ms": 2000}
    monkeypatch.setattr(trainer.server, "_OPTIONS", list({**dict(trainer.server._OPTIONS), **sooner}.items()))
    goes_on: list[threading.Timer] = []

    def stop() -> None:
        pid = cluster.pid(1)
        os.kill(pid, signal.SIGSTOP)
        goes_on.append(threading.Timer(LEASE + 3.0, os.kill, (pid, signal.SIGCONT)))
        goes_on[0].start()

    try:
        run = Disturbed(cluster, job_name, "before step", stop)
    finally:
        for timer in goes_on:
            timer.join()
    # It is waited for, or joined anew where gRPC gives the connection up. No commit is gone back to.
    assert (run.rewinds, [type(error) for error in run.lost]) in (([], []), ([3], [trainer.errors.ServerLost]))


def test_servers_with_little_memory_are_recovered_too(tmp_path: Path) -> None:
    make = functools.partial(Residual, width=128, layers=4)
    with LocalCluster(servers=2, lease=LEASE, memory="3MiB", data_dir=tmp_path) as cluster:
        run = Disturbed(cluster, "job", "backward", lambda: restart(cluster, [1]), make)
        assert run.rewinds == [2]
        for address in cluster.addresses:
            with grpc.insecure_channel(address) as channel:
                status = pb_grpc.ParameterServerStub(channel).Status(pb.StatusRequest(), timeout=10)
            assert status.spilled_bytes > 0
            assert status.peak_resident_bytes <= status.memory_limit_bytes


def test_a_script_that_ends_without_close_ends_its_sessions(tmp_path: Path) -> None:
    with LocalCluster(servers=2, lease=60) as cluster:
        process = start_rank(
            "trainer.recovery.programs:end_without_close", cluster.addresses, 0, 1, tmp_path / "0.pt", job="job"
        )
        output, _ = process.communicate(timeout=100)
        assert process.returncode == 0, output
        for server in range(2):
            assert "session of rank 0/1 ended: its trainer closed it" in cluster.log(server)
