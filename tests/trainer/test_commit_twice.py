"""A step may be committed twice with different content. Two servers are never brought together from both."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import trainer
from ps import LocalCluster
from tests.models import Residual, seeded, train
from tests.ps.client import Client
from tests.trainer.runs import gathered_values

Values = dict[str, torch.Tensor]


class Run:
    """A trainer of the model, from where the servers are."""

    def __init__(self, job: trainer.Job, lr: float = 0.1) -> None:
        self.job = job
        self.started_at = job.step
        self.model = trainer.offload(seeded(Residual), job)
        self.lr = lr

    def train(self, steps: int) -> None:
        optimizer = trainer.RemoteOptimizer(self.model.parameters(), torch.optim.SGD, lr=self.lr)
        train(self.model, optimizer, range(self.job.step, self.job.step + steps))

    def fill(self, value: float, names: tuple[str, ...] = ()) -> None:
        """Overwrites parameters, all unless some are named."""
        params = {name: param for name, param in self.model.named_parameters() if not names or name in names}
        with trainer.gathered(params.values(), modify=True), torch.no_grad():
            for param in params.values():
                param.fill_(value)

    @property
    def values(self) -> Values:
        return gathered_values(self.model)


@contextmanager
def run(cluster: LocalCluster, lr: float = 0.1) -> Iterator[Run]:
    with trainer.connect(cluster.addresses) as job:
        yield Run(job, lr)


def restart(cluster: LocalCluster, *servers: int) -> None:
    for server in servers or range(len(cluster.addresses)):
        cluster.restart(server)


def commits(cluster: LocalCluster) -> list[list[tuple[int, str]]]:
    """What each server lists."""
    clients = [Client(a, job="default", shard=i, num_shards=2, read_only=True) for i, a in enumerate(cluster.addresses)]
    found = [[(c.step, c.commit_id) for c in client.opened.committed] for client in clients]
    for client in clients:
        client.close()
    return found


def same(left: Values, right: Values) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def parameters_of(cluster: LocalCluster, server: int, step: int) -> set[str]:
    """The parameters of which a server has all chunks."""
    folder = Path(cluster.data_dirs[server]) / "default" / "generations" / f"{step:08d}" / "weight"
    return {path.name for path in folder.iterdir() if (path / "c").exists()}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    with LocalCluster(servers=2, data_dir=tmp_path / "state") as cluster:
        yield cluster


def commit_on(cluster: LocalCluster, survivor: int, current: Run) -> None:
    """A commit that ends on one server only, as the other one dies."""
    cluster.kill(1 - survivor)
    with pytest.raises(trainer.ZeroPsError):
        # As `commit`, but for the weights and buffers that it would send to the dead server first.
        current.job._start_commit(current.job._commit_request("{}")).wait()


def test_an_abandoned_commit_does_not_mix_with_the_new_run_that_gets_to_its_step(cluster: LocalCluster) -> None:
    with run(cluster) as first:
        first.train(2)
        first.job.commit()
        common = first.values
        first.train(2)
        commit_on(cluster, 0, first)
    # Server 1 has step 2 only, so the run goes on from there. Then it is server 0 that lacks the new step 4.
    restart(cluster, 1)
    with run(cluster, lr=0.7) as second:
        assert second.started_at == 2 and same(second.values, common)
        second.train(2)
        commit_on(cluster, 1, second)
    restart(cluster)
    abandoned, new = commits(cluster)
    assert [step for step, _ in abandoned] == [step for step, _ in new] == [2, 4]
    with run(cluster, lr=0.3) as third:
        assert third.started_at == 2 and same(third.values, common)
        third.train(2)
        third.job.commit()
        expected = third.values
    restart(cluster)
    with run(cluster) as fourth:
        assert fourth.started_at == 4 and same(fourth.values, expected)
        fourth.train(1)
        fourth.job.commit()
        fourth.train(1)
        fourth.job.commit()
    assert [step for step, _ in commits(cluster)[0]] == [5, 6]
    assert len(set(map(tuple, commits(cluster)))) == 1, "both servers end with the same commits"


@pytest.mark.parametrize("survivor", [0, 1])
def test_changed_weights_that_only_one_server_committed_are_not_mixed_in(cluster: LocalCluster, survivor: int) -> None:
    with run(cluster) as first:
        first.train(2)
        first.job.commit()
        common = first.values
        first.fill(7.0)
        commit_on(cluster, survivor, first)
    restart(cluster)
    assert sorted(len(listed) for listed in commits(cluster)) == [1, 2]
    with run(cluster) as second:
        assert second.started_at == 2 and same(second.values, common)
        second.fill(8.0)
        second.job.commit()
    restart(cluster)
    with run(cluster) as third:
        assert third.started_at == 2
        assert all((value == 8).all() for value in third.values.values())
        third.train(1)
        third.job.commit()
        third.train(1)
        third.job.commit()
    assert {tuple(step for step, _ in listed) for listed in commits(cluster)} == {(3, 4)}


def test_failed_commits_never_cost_the_last_one_that_was_complete(cluster: LocalCluster) -> None:
    with run(cluster) as first:
        first.train(1)
        first.job.commit()
        common = first.values
    for value in (1.0, 2.0):
        with run(cluster) as current:
            assert same(current.values, common)
            current.fill(value)
            commit_on(cluster, 0, current)
        restart(cluster)


# Kills server 1 at an instant that a file names, while it puts a generation in the place of another.
KILLER = """
import os, signal
real = os.rename
def rename(source, target, **options):
    instant = open(os.environ["KILL_AT"]).read() if os.path.exists(os.environ["KILL_AT"]) else ""
    here = "shard-1" in str(target) and instant
    aside = ".replaced-" in str(target)
    if here and instant == "before" and aside:
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target, **options)
    if here and (instant == "between" and aside or instant == "after" and ".tmp-" in str(source)):
        os.kill(os.getpid(), signal.SIGKILL)
os.rename = rename
"""


@pytest.mark.parametrize("instant", ["before", "between", "after"])
def test_a_server_killed_while_it_replaces_a_commit_costs_no_commit(tmp_path: Path, monkeypatch, instant: str) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(KILLER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("KILL_AT", str(tmp_path / "instant"))
    with LocalCluster(servers=2, data_dir=tmp_path / "state") as cluster:
        with run(cluster) as first:
            first.fill(1.0)
            first.job.commit()
            first.fill(2.0)
            (tmp_path / "instant").write_text(instant)
            with pytest.raises(trainer.ZeroPsError):
                first.job.commit()
        (tmp_path / "instant").unlink()
        restart(cluster)
        with run(cluster) as second:
            # Once both servers have it, a commit that nobody was told of is as good as any.
            expected = 2.0 if instant == "after" else 1.0
            assert all((value == expected).all() for value in second.values.values())


def test_a_commit_of_unchanged_state_is_no_new_commit(cluster: LocalCluster) -> None:
    with run(cluster) as first:
        first.train(1)
        first.job.commit()
        before = commits(cluster)
        first.job.commit()
        assert commits(cluster) == before
        assert first.job.complete == before[0][0] == before[1][0]
    restart(cluster)
    with run(cluster) as second:
        second.job.commit()
    assert commits(cluster) == before


@pytest.mark.parametrize("changed", [0, 1])
def test_a_change_on_one_server_gives_both_the_new_commit(cluster: LocalCluster, changed: int) -> None:
    with run(cluster) as first:
        first.train(1)
        first.job.commit()
        here, there = (parameters_of(cluster, server, 1) for server in (changed, 1 - changed))
        first.fill(3.0, tuple(here - there))
        expected = first.values
        first.job.commit()
        after = commits(cluster)
        assert after[0] == after[1] and len(after[0]) == 2
        assert first.job.complete == after[0][-1]
    restart(cluster)
    with run(cluster) as second:
        assert same(second.values, expected)


def test_a_commit_that_failed_on_one_server_can_be_repeated(cluster: LocalCluster) -> None:
    """The server where it went well has that state already, and under another id."""
    with run(cluster) as first:
        first.train(1)
        first.job.commit()
        first.train(1)
        # In the way of what server 1 is about to write.
        obstacle = Path(cluster.data_dirs[1]) / "default" / "generations" / "00000002"
        obstacle.mkdir()
        with pytest.raises(trainer.ZeroPsError, match="move it away and try again"):
            first.job.commit()
        obstacle.rmdir()
        first.job.commit({"tries": 2})
        expected = first.values
        listed = commits(cluster)
        assert listed[0][-1] == listed[1][-1] == first.job.complete
    restart(cluster)
    with run(cluster) as second:
        assert second.started_at == 2 and same(second.values, expected)
        assert second.job.metadata == {"tries": 2}


def test_a_restore_that_reached_one_server_only_is_not_taken_for_common_memory(cluster: LocalCluster) -> None:
    with run(cluster) as first:
        first.train(1)
        first.job.commit()
        common = first.values
        first.fill(5.0)
    # Server 1 restores step 1, then the trainer dies; server 0 still has step 1 with other weights.
    restart(cluster, 1)
    client = Client(cluster.addresses[1], job="default", shard=1, num_shards=2)
    assert [commit.step for commit in client.opened.committed] == [1]
    client.call("Restore", step=1, commit_id=client.opened.committed[0].commit_id)
    client.close()
    with run(cluster) as second:
        assert second.started_at == 1 and same(second.values, common)


def test_servers_that_have_different_commits_of_one_step_are_told_so(cluster: LocalCluster) -> None:
    with run(cluster) as first:
        first.job.commit()
    for server in range(2):
        zarr = Path(cluster.data_dirs[server]) / "default/generations/00000000/zarr.json"
        commit_id = commits(cluster)[server][0][1]
        zarr.write_text(zarr.read_text().replace(commit_id, f"{server}"))
        restart(cluster, server)
    with pytest.raises(trainer.ConnectError, match=r"commits \[0\].*their commits of step 0 are of different runs"):
        trainer.connect(cluster.addresses)


def test_a_commit_that_one_server_cannot_read_is_not_passed_over(cluster: LocalCluster) -> None:
    with run(cluster) as first:
        first.job.commit()
        first.train(1)
        first.job.commit()
    generation = Path(cluster.data_dirs[1]) / "default/generations/00000001"
    (generation / "zarr.json").write_text("{")
    restart(cluster)
    with pytest.raises(trainer.ConnectError, match=rf"{cluster.addresses[1]} cannot read its commit of step 1"):
        trainer.connect(cluster.addresses)
    generation.rename(generation.with_name("damaged"))
    with run(cluster) as second:
        assert second.started_at == 0
