"""`commit(wait=False)`: servers write while training goes on; what is committed is the state as it was."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import trainer
from ps import LocalCluster
from ps.store import JobStore
from tests.models import Residual, seeded, train
from tests.trainer.runs import gathered_values

LARGE = {"vocabulary": 3001, "width": 700, "layers": 1}  # 15 MB of weights in several chunks


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(servers=2) as cluster:
        yield cluster


def large() -> torch.nn.Module:
    return Residual(**LARGE)


def start(
    job: trainer.Job, make: Callable[[], torch.nn.Module] = large
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    with job.init():
        model = seeded(make)
    trainer.offload(model, job)
    return model, trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)


def stored(cluster: LocalCluster, job: str, step: int) -> dict[str, torch.Tensor]:
    """The chunks of all weights in a generation, by parameter and chunk."""
    found = {}
    for shard, folder in enumerate(cluster.data_dirs):
        store = JobStore(folder, job, shard, 2)
        names = [p.name for p in store.read_header(step).manifest]
        for chunk in store.read_chunks(step):
            found[f"{names[chunk.parameter]} {chunk.chunk}"] = chunk.weight
    return found


def equal(chunks: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> bool:
    by_name: dict[str, list[torch.Tensor]] = {}
    for label in sorted(chunks, key=lambda label: int(label.split()[1])):
        by_name.setdefault(label.split()[0], []).append(chunks[label].reshape(-1))
    return all(
        torch.equal(torch.cat(by_name[name]), value.reshape(-1)) for name, value in values.items() if value.numel()
    )


def test_what_is_committed_is_the_state_at_the_call_whatever_steps_follow(cluster: LocalCluster, job_name: str) -> None:
    plain = seeded(large)
    expected = train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True), range(9))
    losses, commits, values = [], [], {}
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model, optimizer = start(job)
        for step in range(9):
            losses += train(model, optimizer, [step])
            if step % 3 == 2:
                values[job.step] = gathered_values(model)
                commits.append(job.commit({"seen": job.step}, wait=False))
        for commit in commits:
            commit.wait(60)
            assert commit.done()
        assert job.metadata == {"seen": 9}
    assert losses == expected
    for step in (6, 9):
        assert equal(stored(cluster, job_name, step), values[step])


def test_updates_wait_only_for_their_own_chunks(cluster: LocalCluster, job_name: str) -> None:
    """Steps straight after each other, without a forward that would give the commit time."""
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model, optimizer = start(job)
        train(model, optimizer, range(2))
        values = gathered_values(model)
        commit = job.commit(wait=False)
        for _ in range(3):
            optimizer.step()
        assert job.step == 5
        commit.wait()
        assert equal(stored(cluster, job_name, 2), values)
        job.commit()
        assert equal(stored(cluster, job_name, 5), gathered_values(model))


def test_changed_weights_wait_for_the_commit_of_the_old_ones(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model, _ = start(job)
        values = gathered_values(model)
        commit = job.commit(wait=False)
        with trainer.gathered(model.parameters(), modify=True), torch.no_grad():
            for param in model.parameters():
                param.fill_(3.0)
        commit.wait()
        assert equal(stored(cluster, job_name, 0), values)
        job.commit()
        assert all((chunk == 3.0).all() for chunk in stored(cluster, job_name, 0).values())


def test_a_finished_handle_is_what_a_commit_that_waits_returns(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        start(job, Residual)
        commit = job.commit()
        assert isinstance(commit, trainer.Commit)
        assert commit.done() and commit.step == 0
        commit.wait()
        assert repr(commit) == "Commit(step=0, done)"


def test_closing_waits_for_the_commit(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        start(job)
        commit = job.commit({"a": 1}, wait=False)
    assert commit.done()
    assert stored(cluster, job_name, 0)


@pytest.fixture
def obstructed(
    cluster: LocalCluster, job_name: str
) -> Iterator[tuple[trainer.Job, torch.nn.Module, torch.optim.Optimizer, Path]]:
    """A job whose second server cannot commit step 1: something is in the way."""
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model, optimizer = start(job, Residual)
        job.commit()
        train(model, optimizer, [0])
        obstacle = Path(cluster.data_dirs[1]) / job_name / "generations" / "00000001"
        obstacle.mkdir()
        yield job, model, optimizer, obstacle


def until_done(commit: trainer.Commit) -> None:
    end = time.monotonic() + 30
    while not commit.done():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_error_is_raised_by_whoever_waits(obstructed, cluster: LocalCluster, job_name: str) -> None:
    job, model, optimizer, obstacle = obstructed
    commit = job.commit(wait=False)
    for _ in range(2):
        with pytest.raises(trainer.ServerFailure, match="move it away and try again"):
            commit.wait()
    assert repr(commit) == "Commit(step=1, failed)"
    # Who was told is not told again, and all is as before.
    train(model, optimizer, [1])
    obstacle.rmdir()
    job.commit()
    assert job.complete is not None and job.complete[0] == 2


def test_an_error_that_nobody_waited_for_is_raised_by_the_next_step(obstructed) -> None:
    job, model, optimizer, _ = obstructed
    until_done(job.commit(wait=False))
    with pytest.raises(trainer.ServerFailure, match="move it away and try again"):
        train(model, optimizer, [1])
    assert job.step == 1
    optimizer.step()
    assert job.step == 2


def test_an_error_that_nobody_waited_for_is_raised_by_the_next_commit(obstructed) -> None:
    job, _, _, obstacle = obstructed
    job.commit(wait=False)
    with pytest.raises(trainer.ServerFailure, match="move it away and try again"):
        job.commit()
    obstacle.rmdir()
    job.commit()


def test_an_error_that_nobody_waited_for_is_raised_when_the_job_is_closed(obstructed) -> None:
    job, _, _, _ = obstructed
    job.commit(wait=False)
    with pytest.raises(trainer.ServerFailure, match="move it away and try again"):
        job.close()
    job.close()


def test_another_error_that_ends_the_block_is_not_hidden(obstructed) -> None:
    job, _, _, _ = obstructed
    job.commit(wait=False)
    with pytest.raises(ZeroDivisionError) as raised, job:
        1 / 0  # noqa: B018
    assert "move it away and try again" in raised.value.__notes__[0]


def test_a_wait_that_is_too_short_says_so_and_the_commit_goes_on(tmp_path: Path) -> None:
    with LocalCluster(servers=1, data_dir=tmp_path) as cluster, trainer.connect(cluster.addresses) as job:
        start(job, Residual)
        os.kill(cluster.pid(0), signal.SIGSTOP)
        try:
            # What the server gets while it is stopped it answers later.
            commit = job._start_commit(job._commit_request("{}"))
            assert not commit.done() and repr(commit) == "Commit(step=0, under way)"
            with pytest.raises(trainer.DeadlineExceeded, match=r"waited 0.2 s for server .* to commit step 0"):
                commit.wait(0.2)
        finally:
            os.kill(cluster.pid(0), signal.SIGCONT)
        commit.wait(30)
        assert job.complete is not None and job.complete[0] == 0


def test_a_server_that_dies_while_it_commits_leaves_the_last_commit(tmp_path: Path) -> None:
    with LocalCluster(servers=2, data_dir=tmp_path) as cluster:
        with pytest.raises(trainer.ConnectError), trainer.connect(cluster.addresses) as job:
            model, optimizer = start(job)
            train(model, optimizer, range(1))
            job.commit()
            values = gathered_values(model)
            train(model, optimizer, range(1, 2))
            commit = job.commit(wait=False)
            cluster.kill(1)
            commit.wait()
        cluster.kill(0)
        for server in range(2):
            cluster.restart(server)
        with trainer.connect(cluster.addresses) as job:
            assert job.step in (1, 2)
            if job.step == 1:
                model, _ = start(job)
                assert all(torch.equal(v, values[n]) for n, v in gathered_values(model).items())
