"""Commits survive every process; what goes on from one goes on with the same bits."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import torch

from protos import zero_ps_pb2 as pb
from ps import LocalCluster, commits
from ps.errors import SessionEnded
from ps.job import Job
from ps.monitor import Patience
from ps.opening import open_job
from ps.options import ServerOptions
from ps.sessions import Session
from ps.store import CommitKey, DataDir, StoredParameter
from ps.tier import Incoming, Tier
from tests.ps.client import Client, error_of, spec, start_job

SHAPES = {"a": (), "b": (1200, 1001), "c": (17, 3), "d": (0, 2)}


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(1) as cluster:
        yield cluster


@pytest.fixture
def address(cluster: LocalCluster) -> str:
    return cluster.addresses[0]


def random_parameters() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


def train(client: Client, first: int, last: int) -> list[torch.Tensor]:
    """Steps `first` to `last`, with gradients that depend on the step only; the parameters after them."""
    for step in range(first, last):
        torch.manual_seed(1000 + step)
        client.call("ZeroGrad", step=step)
        for number, shape in enumerate(SHAPES.values()):
            client.push_gradient(number, torch.randn(shape), step=step)
        client.step(step)
    return [client.pull(number, version=last) for number in range(len(SHAPES))]


def resume(address: str, job: str, step: int, optimizer: str, **options: object) -> Client:
    client = Client(address, job=job)
    assert step in client.committed_steps
    client.call("Restore", step=step)
    assert not client.open_job(random_parameters()).needs_weights
    client.set_optimizer(optimizer, **options)
    return client


def commit(client: Client, step: int, **fields: object):
    return client.call("Commit", step=step, timeout_seconds=20, **fields)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [("AdamW", {"lr": 0.1}), ("SGD", {"lr": 0.1, "momentum": 0.9}), ("SGD", {"lr": 0.1}), ("NAdam", {})],
)
def test_training_goes_on_with_the_same_bits_after_a_crash(optimizer: str, options: dict) -> None:
    with LocalCluster(1) as cluster:
        address = cluster.addresses[0]
        (client,) = start_job(address, random_parameters(), optimizer, **options)
        train(client, 0, 3)
        written = commit(client, 3, metadata='{"epoch": 2}')
        assert Path(written.path) == cluster.data_dirs[0] / "job" / "generations" / "00000003"
        assert written.bytes_written >= 4 * sum(p.numel() for p in random_parameters().values())
        expected = train(client, 3, 6)
        cluster.kill(0)
        client.drop()
        cluster.restart(0)
        client = Client(address)
        assert (client.opened.step, client.committed_steps) == (-1, [3])
        assert json.loads(client.call("Restore", step=3).metadata) == {"epoch": 2}
        client.open_job(random_parameters())
        client.set_optimizer(optimizer, **options)
        assert all(map(torch.equal, train(client, 3, 6), expected))


def test_a_restore_undoes_what_came_after(address: str, job_name: str) -> None:
    (client,) = start_job(address, random_parameters(), "AdamW", job=job_name, lr=0.1)
    train(client, 0, 2)
    commit(client, 2)
    expected = train(client, 2, 4)
    client.push_gradient(1, torch.ones(SHAPES["b"]), step=4)
    client.call("Restore", step=2)
    client.set_optimizer("AdamW", lr=0.1)
    assert all(map(torch.equal, train(client, 2, 4), expected))


def test_a_restore_that_is_sent_again_does_not_undo_what_came_after(address: str, job_name: str) -> None:
    (client,) = start_job(address, {"w": torch.zeros(4)}, job=job_name, lr=1.0)
    client.call("Commit")
    client.call("Restore", restore_id="ab")
    client.set_optimizer(lr=1.0)
    client.push_gradient(0, torch.ones(4))
    client.step(0)
    client.call("Restore", restore_id="ab")
    assert torch.equal(client.pull(0, version=1), torch.full((4,), -1.0))
    client.call("Restore", restore_id="ac")
    assert torch.equal(client.pull(0), torch.zeros(4))


def test_generations_of_an_abandoned_run_do_not_pass_for_the_new_one(
    cluster: LocalCluster, address: str, job_name: str
) -> None:
    (client,) = start_job(address, random_parameters(), "SGD", job=job_name, lr=0.1)
    for step in range(4):
        train(client, step, step + 1)
        commit(client, step + 1)
    client.call("Restore", step=1)
    client.set_optimizer("SGD", lr=0.7)
    new = train(client, 1, 3)
    commit(client, 3)
    assert Client(address, job=job_name).committed_steps == [1, 2, 3, 3]
    client = resume(address, job_name, 3, "SGD", lr=0.7)
    assert all(torch.equal(client.pull(i, version=3), new[i]) for i in range(len(new)))


def test_old_generations_go_once_all_servers_have_a_newer_one(address: str, job_name: str) -> None:
    (client,) = start_job(address, random_parameters(), job=job_name)
    complete = None
    for step in range(5):
        train(client, step, step + 1)
        written = commit(client, step + 1, complete=complete)
        complete = pb.CommittedGeneration(step=step + 1, commit_id=written.commit_id)
    assert Client(address, job=job_name).committed_steps == [4, 5]


def test_a_commit_waits_for_the_updates_and_may_be_repeated(address: str, job_name: str) -> None:
    torch.manual_seed(0)
    large = {f"p{i}": torch.randn(1_000_000) for i in range(6)}
    clients = start_job(address, large, "AdamW", job=job_name, world_size=2)
    for number in range(6):
        clients[0].push_gradient(number, torch.ones(1_000_000))
    with ThreadPoolExecutor() as pool:
        early = pool.submit(commit, clients[0], 1, metadata='{"rank": 0}')
        for client in clients:
            client.step(0)
        assert early.result().bytes_written > 6 * 4_000_000
    again = commit(clients[1], 1, metadata='{"rank": 1}')
    assert again.path == early.result().path
    assert again.bytes_written == 0
    assert Client(address, job=job_name, read_only=True).opened.metadata == '{"rank": 0}'


def test_buffers_that_did_not_change_leave_a_generation_as_it_is(address: str, job_name: str) -> None:
    (client,) = start_job(address, random_parameters(), job=job_name)
    train(client, 0, 1)
    commit(client, 1)
    client.push_weight(2, client.pull(2, version=1), step=1)
    assert commit(client, 1).bytes_written == 0
    client.push_weight(2, torch.zeros(17, 3), step=1)
    assert commit(client, 1).bytes_written > 0
    client = resume(address, job_name, 1, "SGD")
    assert torch.equal(client.pull(2, version=1), torch.zeros(17, 3))


def test_a_commit_of_a_step_that_is_past_or_far_away_fails(address: str, job_name: str) -> None:
    (client,) = start_job(address, random_parameters(), job=job_name)
    train(client, 0, 2)
    assert error_of(lambda: commit(client, 1))[0] == grpc.StatusCode.OUT_OF_RANGE
    code, message = error_of(lambda: client.call("Commit", step=9, timeout_seconds=0.2))
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "step 9" in message


@pytest.mark.parametrize("metadata", ["[]", "nonsense", "3", '{"a": ' + "[" * 100_000, "{" + " " * (1 << 20) + "}"])
def test_metadata_has_to_be_a_small_json_object(address: str, job_name: str, metadata: str) -> None:
    (client,) = start_job(address, {"w": torch.zeros(1)}, job=job_name)
    assert error_of(lambda: commit(client, 0, metadata=metadata))[0] == grpc.StatusCode.INVALID_ARGUMENT


def test_a_step_that_was_never_committed_cannot_be_restored(address: str, job_name: str) -> None:
    (client,) = start_job(address, random_parameters(), job=job_name)
    expected = train(client, 0, 1)
    commit(client, 1)
    code, message = error_of(lambda: client.call("Restore", step=7))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "it has 1" in message
    assert all(torch.equal(client.pull(i, version=1), p) for i, p in enumerate(expected)), "nothing was dropped"


def test_a_damaged_generation_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with LocalCluster(1, data_dir=tmp_path) as cluster:
        (client,) = start_job(cluster.addresses[0], random_parameters())
        path = Path(commit(client, 0).path)
        chunk = max(path.glob("weight/b/c/**/*"), key=lambda file: file.is_file())
        chunk.write_bytes(b"short")
        cluster.restart(0)
        client = Client(cluster.addresses[0])
        code, message = error_of(lambda: client.call("Restore", step=0))
        assert code == grpc.StatusCode.DATA_LOSS
        assert str(chunk) in message


def test_a_new_job_does_not_begin_over_commits_that_nobody_restored(tmp_path: Path) -> None:
    with LocalCluster(1, data_dir=tmp_path) as cluster:
        (client,) = start_job(cluster.addresses[0], random_parameters())
        commit(client, 0)
        cluster.restart(0)
        client = Client(cluster.addresses[0])
        code, message = error_of(lambda: client.open_job(random_parameters()))
        assert code == grpc.StatusCode.FAILED_PRECONDITION
        assert "has committed steps on shard 0 (0) and none of them was restored" in message


def test_a_restored_job_can_be_committed_without_an_optimizer(address: str, job_name: str) -> None:
    """As an evaluation that keeps what it was given."""
    (client,) = start_job(address, random_parameters(), "AdamW", job=job_name, lr=0.1)
    train(client, 0, 1)
    commit(client, 1)
    expected = train(client, 1, 3)
    client.call("Restore", step=1)
    client.open_job(random_parameters())
    client.push_weight(0, torch.zeros(()), step=1)
    client.push_weight(0, random_parameters()["a"] * 0 + 1, step=1)
    commit(client, 1)
    client = resume(address, job_name, 1, "AdamW", lr=0.1)
    assert torch.equal(client.pull(0, version=1), torch.ones(()))
    assert all(map(torch.equal, train(client, 1, 3)[1:], expected[1:]))


def test_the_union_of_two_servers_holds_every_chunk_once(tmp_path: Path) -> None:
    parameters = {f"p{i}": torch.randn(700_000) for i in range(7)}
    with LocalCluster(2, data_dir=tmp_path) as cluster:
        clients = [Client(a, shard=i, num_shards=2) for i, a in enumerate(cluster.addresses)]
        digests = {client.open_job(parameters).placement_digest for client in clients}
        assert len(digests) == 1
        for number, tensor in enumerate(parameters.values()):
            refused = [error_of_or_none(lambda c=c, n=number, t=tensor: c.push_weight(n, t)) for c in clients]
            assert sorted(code is None for code in refused) == [False, True]
        for client in clients:
            client.call("Commit", timeout_seconds=10)
    found = {}
    for shard in range(2):
        with DataDir(tmp_path / f"shard-{shard}", shard, 2) as folder:
            for state in folder.job_store("job").read_chunks(0):
                assert state.parameter not in found
                found[state.parameter] = state.weight
    assert all(torch.equal(found[i], tensor) for i, tensor in enumerate(parameters.values()))


def error_of_or_none(call):
    try:
        call()
    except Exception as error:
        return error
    return None


def listed(address: str, job: str) -> list[tuple[int, str]]:
    return [(c.step, c.commit_id) for c in Client(address, job=job, read_only=True).opened.committed]


def test_a_commit_of_unchanged_state_answers_the_id_that_is_there(address: str, job_name: str) -> None:
    (client,) = start_job(address, random_parameters(), job=job_name)
    assert commit(client, 0, commit_id="a").commit_id == "a"
    for commit_id in "ab":
        again = commit(client, 0, commit_id=commit_id)
        assert (again.commit_id, again.bytes_written) == ("a", 0)
    assert listed(address, job_name) == [(0, "a")]


def test_a_renewed_commit_is_written_under_its_own_id(address: str, job_name: str) -> None:
    (client,) = start_job(address, random_parameters(), job=job_name)
    commit(client, 0, commit_id="a", metadata='{"n": 1}')
    renewed = commit(client, 0, commit_id="b", metadata='{"n": 2}', renew=True)
    assert (renewed.commit_id, renewed.bytes_written) == ("b", 0), "its chunks are links"
    again = commit(client, 0, commit_id="b", renew=True)
    assert (again.commit_id, again.bytes_written) == ("b", 0)
    assert listed(address, job_name) == [(0, "a"), (0, "b")]
    assert client.call("Restore", commit_id="a").metadata == '{"n": 1}'
    assert client.call("Restore", commit_id="b").metadata == '{"n": 2}'


def test_an_id_stands_for_one_content(address: str, job_name: str) -> None:
    (client,) = start_job(address, random_parameters(), job=job_name)
    commit(client, 0, commit_id="a")
    client.push_weight(2, torch.zeros(17, 3))
    code, message = error_of(lambda: commit(client, 0, commit_id="a"))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "step 0, commit a of job" in message and "new id" in message


def test_a_step_committed_twice_can_be_restored_either_way(address: str, job_name: str) -> None:
    (client,) = start_job(address, random_parameters(), job=job_name)
    for number, commit_id in enumerate("abc"):
        client.push_weight(2, torch.full((17, 3), float(number)))
        commit(client, 0, commit_id=commit_id, complete=pb.CommittedGeneration(commit_id="a") if number else None)
    assert listed(address, job_name) == [(0, "a"), (0, "c")], "b was never known to be on all servers"
    for commit_id, number in (("a", 0), ("c", 2), ("a", 0)):
        client.call("Restore", commit_id=commit_id)
        assert torch.equal(client.pull(2), torch.full((17, 3), float(number)))
        assert listed(address, job_name) == [(0, "a"), (0, "c")], "a restore changes nothing on disk"
    # Goes on from a; c was abandoned.
    written = commit(client, 0, commit_id="d", complete=pb.CommittedGeneration(commit_id="a"))
    assert (written.commit_id, Path(written.path).name) == ("a", "00000000")
    assert listed(address, job_name) == [(0, "a")]


def test_a_restore_leaves_newer_commits_until_the_next_one(address: str, job_name: str) -> None:
    (client,) = start_job(address, random_parameters(), job=job_name)
    for step in range(3):
        train(client, step, step + 1)
        commit(client, step + 1)
    client.call("Restore", step=1)
    client.set_optimizer()
    commit(client, 1)
    train(client, 1, 2)
    assert [step for step, _ in listed(address, job_name)] == [1, 2, 3]
    commit(client, 2)
    assert [step for step, _ in listed(address, job_name)] == [1, 2, 2]


def test_a_restore_of_a_trainer_that_was_replaced_meanwhile_changes_nothing(tmp_path: Path, monkeypatch) -> None:
    def session(incarnation: str) -> Session:
        return job.open_session(0, 1, incarnation, False, Patience.of(5), job.sessions.number + 1)

    with DataDir(tmp_path, 0, 1) as data_dir:
        job = Job("gpt", ServerOptions(0, 1), data_dir.job_store("gpt"), Tier())
        old = session("old")
        open_job(job, old, [StoredParameter("w", (3,), torch.float32, "parameter", True)], {})
        shard = job.open_shard()
        job.write_weights(old, shard, 0, [(chunk, Incoming(torch.zeros(3), None)) for chunk in shard])
        key = CommitKey(0, "a")
        commits.commit(job, old, commits.CommitRequest(key, ""), Patience.of(5))
        job.write_weights(old, shard, 0, [(chunk, Incoming(torch.ones(3), None)) for chunk in shard])
        read_into = job.generations.read_into

        def slowly(*arguments: object) -> None:
            read_into(*arguments)
            session("new")

        monkeypatch.setattr(job.generations, "read_into", slowly)
        with pytest.raises(SessionEnded):
            commits.restore(job, old, key, "1", Patience.of(5))
        assert job.usable_step == -1, "which is what the new trainer was told"
        job.close()


# ---------------------------------------------------------------- readers


def test_a_reader_opens_a_job_that_has_trainers_and_changes_nothing(address: str, job_name: str) -> None:
    parameters = random_parameters()
    (client,) = start_job(address, parameters, job=job_name)
    commit(client, 0)
    reader = Client(address, job=job_name, read_only=True)
    assert reader.opened.step == 0
    frozen = [spec(name, tensor) for name, tensor in parameters.items()]
    for parameter in frozen:
        parameter.trainable = False
    opened = reader.call("OpenJob", manifest=pb.Manifest(parameters=frozen))
    reader.manifest = opened.manifest
    assert not opened.needs_weights
    assert all(p.trainable for p in opened.manifest.parameters)
    assert torch.equal(reader.pull(1), parameters["b"])
    assert "'c' differs" in error_of(lambda: reader.open_job({**parameters, "c": torch.zeros(1)}))[1]
    assert reader.call("Restore", step=0).metadata == ""
    train(client, 0, 1)
    code, message = error_of(lambda: reader.call("Restore", step=0))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "cannot restore step 0" in message
    assert "it has trainers (rank 0/1)" in message
    client.close()
    assert "which has step 1 in memory" in error_of(lambda: reader.call("Restore", step=0))[1]
    assert reader.pull(0, version=1).shape == ()


def test_a_reader_restores_a_job_that_nobody_uses(tmp_path: Path) -> None:
    parameters = random_parameters()
    with LocalCluster(1, data_dir=tmp_path) as cluster:
        (client,) = start_job(cluster.addresses[0], parameters, job="job")
        commit(client, 0, metadata='{"a": 1}')
    with LocalCluster(1, data_dir=tmp_path) as cluster:
        reader = Client(cluster.addresses[0], job="job", read_only=True)
        assert (reader.opened.step, reader.committed_steps) == (-1, [0])
        assert reader.call("Restore", step=0).metadata == '{"a": 1}'
        reader.open_job(parameters)
        assert torch.equal(reader.pull(2), parameters["c"])


def test_a_reader_creates_nothing(address: str, job_name: str) -> None:
    code, message = error_of(lambda: Client(address, job=job_name, read_only=True))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert f"no job '{job_name}' on this server" in message
    client = Client(address, job=job_name)
    assert job_name in {job.name for job in client.stub.Status(pb.StatusRequest()).jobs}
    reader = Client(address, job=job_name, read_only=True)
    code, message = error_of(lambda: reader.open_job(random_parameters()))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "has no state on this server, and a read-only session cannot create it" in message


def test_what_did_not_change_is_linked_to_the_generation_before(address: str, job_name: str) -> None:
    """A parameter without a gradient stands for frozen weights."""
    (client,) = start_job(address, random_parameters(), "AdamW", job=job_name, lr=0.1)
    train(client, 0, 1)
    first = Path(commit(client, 1).path)
    client.call("ZeroGrad", step=1)
    client.push_gradient(2, torch.ones(17, 3), step=1)
    client.step(1)
    second = commit(client, 2)
    assert second.bytes_written == 17 * 3 * 4 * 3 + 4
    for key, linked in (
        ("weight/b/c/0/0", True),
        ("exp_avg/b/c/0/0", True),
        ("step/b/c/0", True),
        ("weight/c/c/0/0", False),
    ):
        assert os.path.samefile(first / key, Path(second.path) / key) == linked, key
    expected = train(client, 2, 4)
    # Also after a restore the files that it was read from are known.
    client.call("Restore", step=2)
    client.set_optimizer("AdamW", lr=0.1)
    client.push_gradient(2, torch.ones(17, 3), step=2)
    client.step(2)
    third = commit(client, 3, complete=pb.CommittedGeneration(step=2, commit_id=client.commits[job_name, 2]))
    assert third.bytes_written == 17 * 3 * 4 * 3 + 4
    assert os.path.samefile(Path(second.path) / "weight/b/c/0/0", Path(third.path) / "weight/b/c/0/0")
    client.call("Restore", step=2)
    client.set_optimizer("AdamW", lr=0.1)
    assert all(map(torch.equal, train(client, 2, 4), expected))
