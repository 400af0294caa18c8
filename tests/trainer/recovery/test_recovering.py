"""What `Job.recovering` and `Job.recover` mend, what passes, and what is as it was afterwards."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import trainer
from protos import zero_ps_pb2 as pb
from ps import LocalCluster
from tests.models import Residual, batch, loss_of, seeded
from tests.trainer.recovery.programs import Plain, adamw
from tests.trainer.runs import Deep, gathered_values, live_bytes
from trainer.errors import NoCommonState
from trainer.offload import find
from trainer.server import Server


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(servers=2, lease=5) as cluster:
        yield cluster


def normalized() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))


def end_sessions(job: trainer.Job) -> None:
    """As if the leases had run out; the servers keep the state."""
    for server in job.servers:
        server.call("EndGroup", pb.EndGroupRequest(session_id=server.session_id, reason="test"), 20)


def test_who_is_lost_is_what_a_trainer_hears_of_every_server(cluster: LocalCluster, job_name: str) -> None:
    """Also of one that it has told itself, by a heartbeat that found out."""
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(
            lambda rank: trainer.connect(cluster.addresses, job=job_name, rank=rank, world_size=2, timeout=60), range(2)
        )
    with one, other:
        other.connection.session.stop()
        knows = other.servers[0]
        knows.call("EndGroup", pb.EndGroupRequest(session_id=knows.session_id, reason="a test"), 20)
        for server in reversed(one.servers):
            with pytest.raises(trainer.TrainerLost, match="rank 1 of job"):
                beat_until_it_ends(server)


def beat_until_it_ends(server: Server) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        server.call("Heartbeat", pb.HeartbeatRequest(session_id=server.session_id), 20)
        time.sleep(0.02)


def step(job: trainer.Job, model: nn.Module, optimizer: trainer.RemoteOptimizer) -> float:
    loss = loss_of(model, batch(job.step))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize("link", ["shm", "gloo", "grpc"])
@pytest.mark.parametrize("place", ["forward", "backward", "clip", "step"])
def test_a_step_is_made_again_from_memory_with_the_same_bits(
    cluster: LocalCluster, job_name: str, link: str, place: str
) -> None:
    plain = Plain().train_to(4)
    rewinds: list[int] = []
    with trainer.connect(cluster.addresses, job=job_name, links=[link], timeout=60) as job:
        model = trainer.offload(seeded(Residual), job, trainer.OffloadConfig(param_persistence_threshold=8))
        optimizer = adamw(model)

        def disturb(here: str) -> None:
            nonlocal place
            if here == place and job.step == 2:
                place = ""
                end_sessions(job)

        model.blocks[0].register_forward_hook(lambda *_: disturb("forward"))
        model.blocks[0].up.weight.register_hook(lambda *_: disturb("backward"))
        while job.step < 4:
            with job.recovering(rewinds.append):
                made = job.step
                loss = loss_of(model, batch(made))
                assert loss.item() == plain.losses[made][0]
                loss.backward()
                trainer.clip_grad_norm_(model.parameters(), 1e9)
                disturb("clip")
                optimizer.step()
                disturb("step")
                optimizer.zero_grad()
        assert not place
        # A step that was made is not made again.
        assert rewinds in ([], [2])
        plain.check(gathered_values(model))
        trainer.release(model)
        assert live_bytes(model) == 0
        assert find(model).coordinator.residency.live_bytes == 0  # type: ignore[union-attr]


def test_recovery_from_memory_keeps_what_backward_added_up_out(cluster: LocalCluster, job_name: str) -> None:
    plain = Plain().train_to(1)
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(seeded(Residual), job)
        optimizer = adamw(model)
        loss_of(model, batch(7)).backward()
        loss_of(model, batch(8)).backward()
        began = time.monotonic()
        assert job.recover() == 0
        assert time.monotonic() - began < 30
        assert all(param.grad is None for param in model.parameters())
        assert step(job, model, optimizer) == plain.losses[0][0]
        plain.check(gathered_values(model))


def test_buffers_are_those_of_the_step_that_is_made_again(cluster: LocalCluster, job_name: str) -> None:
    plain = seeded(normalized)
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(seeded(normalized), job)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        for number in range(3):
            x = torch.randn(5, 6, generator=torch.Generator().manual_seed(number))
            plain(x).sum().backward()
            plain_optimizer.step()
            plain_optimizer.zero_grad()
            while job.step == number:
                with job.recovering():
                    model(x).sum().backward()
                    if number == 1 and not job.failures:
                        end_sessions(job)
                    optimizer.step()
                    optimizer.zero_grad()
        for name, buffer in plain.named_buffers():
            assert torch.equal(dict(model.named_buffers())[name], buffer), name


def test_a_step_that_may_be_half_done_is_made_again(cluster: LocalCluster, job_name: str) -> None:
    def make() -> nn.Module:
        return Deep(4, 64)

    def fail(gradient: torch.Tensor) -> None:
        if job.step == 4 and not rewinds:
            # Gradients that are final may have been used by now.
            time.sleep(0.2)
            raise ValueError("a bad batch")

    plain = seeded(make)
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    rewinds: list[int] = []
    with trainer.connect(cluster.addresses, job=job_name, timeout=60) as job:
        model = trainer.offload(seeded(make), job)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        model.layers[0].weight.register_hook(fail)
        while job.step < 6:
            with job.recovering(rewinds.append):
                if job.step == 3:
                    job.commit()
                try:
                    with optimizer.last_backward():
                        model(torch.ones(2, 64)).sum().backward()
                except ValueError:
                    # As a loop does that leaves a bad batch out.
                    assert isinstance(job.broken, trainer.StepHalfDone)
                    continue
                finally:
                    job.check()
                optimizer.step()
                optimizer.zero_grad()
        for _ in range(6):
            plain(torch.ones(2, 64)).sum().backward()
            plain_optimizer.step()
            plain_optimizer.zero_grad()
        # To the commit if a chunk had moved on.
        assert rewinds in ([3], [4])
        values = gathered_values(model)
        for name, param in plain.named_parameters():
            assert torch.equal(values[name], param), name


def test_buffers_go_back_with_a_step_that_the_others_had_not_asked_for(cluster: LocalCluster, job_name: str) -> None:
    x = torch.randn(5, 6)

    def made(rank: int) -> tuple[trainer.Job, nn.Module, trainer.RemoteOptimizer]:
        job = trainer.connect(cluster.addresses, job=job_name, rank=rank, world_size=2, timeout=60)
        model = trainer.offload(seeded(normalized), job)
        return job, model, trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)

    with ThreadPoolExecutor(2) as pool:
        (job, model, optimizer), (other, *_) = pool.map(made, range(2))
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        rewinds: list[int] = []
        with job.recovering(rewinds.append):
            model(x).sum().backward()
            optimizer.step()
        # It is ahead of the other rank, and of what the servers have.
        assert job.step == 1 and rewinds == []
        end_sessions(job)
        again = pool.submit(other.recover)
        with job.recovering(rewinds.append):
            model(x)
        assert again.result() == job.step == 0 and rewinds == [0]
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, before[name]), name
        other.close()
        job.close()


def test_a_regroup_that_goes_back_says_so_before_the_body() -> None:
    with LocalCluster(servers=1, lease=5) as cluster, trainer.connect(cluster.addresses, timeout=60) as job:
        model = trainer.offload(seeded(Residual), job)
        optimizer = adamw(model)
        step(job, model, optimizer)
        job.commit()
        step(job, model, optimizer)
        step(job, model, optimizer)
        cluster.restart(0)
        # As if another trainer had asked to join.
        job.regroup_at = job.step
        rewinds: list[int] = []
        with job.recovering(rewinds.append):
            assert rewinds == [1] and job.step == 1
            step(job, model, optimizer)
        assert rewinds == [1]


def test_a_body_without_a_step_is_no_rewind(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        rewinds: list[int] = []
        with job.recovering(rewinds.append):
            pass
        assert rewinds == []


def test_a_closed_job_is_not_recovered(cluster: LocalCluster, job_name: str) -> None:
    job = trainer.connect(cluster.addresses, job=job_name)
    job.close()
    with pytest.raises(trainer.ConfigError, match="is closed"):
        job.recover()
    with pytest.raises(trainer.ConfigError, match="is closed"), job.recovering():
        pass


def test_bodies_that_make_their_step_and_fail_then_are_never_given_up(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(seeded(Residual), job)
        optimizer = adamw(model)
        while job.step < 23:
            with job.recovering():
                step(job, model, optimizer)
                with trainer.gathered(list(model.parameters())):
                    pass  # The servers have made it, too.
                raise trainer.DeadlineExceeded("again")


@pytest.mark.parametrize("error", [trainer.ServerFailure, trainer.ConfigError, KeyError, KeyboardInterrupt])
def test_other_errors_pass(cluster: LocalCluster, job_name: str, error: type[BaseException]) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        group = job.connection.place.group
        with pytest.raises(error), job.recovering():
            raise error("no")
        assert job.connection.place.group == group, "nothing was done about it"


def test_a_step_that_fails_over_and_over_is_given_up(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        seen = 0
        with pytest.raises(trainer.DeadlineExceeded, match="again"):
            while True:
                with job.recovering():
                    seen += 1
                    raise trainer.DeadlineExceeded("again")
        assert seen == 21


def test_a_job_without_a_commit_does_not_begin_anew_under_a_trainer() -> None:
    with LocalCluster(servers=1, lease=5) as cluster, trainer.connect(cluster.addresses, timeout=20) as job:
        model = trainer.offload(seeded(Residual), job)
        optimizer = adamw(model)
        step(job, model, optimizer)
        cluster.kill(0)
        with (
            pytest.raises(trainer.ConnectError, match="could not be recovered: no parameter server answers at"),
            job.recovering(timeout=1.0),
        ):
            step(job, model, optimizer)
        cluster.restart(0)
        with pytest.raises(NoCommonState, match="nothing of job 'default' was committed"):
            job.recover()


def test_a_model_that_nobody_offloaded_yet_survives_its_group(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        end_sessions(job)
        assert job.recover() == 0
        model = trainer.offload(seeded(Residual), job)
        assert step(job, model, adamw(model)) == Plain().train_to(1).losses[0][0]
