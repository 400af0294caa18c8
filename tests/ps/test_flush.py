"""While a commit is written, chunks that are still to be written stay as they are, and no others."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from protos.values import Option
from ps import commits
from ps.chunk import Chunk
from ps.contributions import Gradient
from ps.errors import Conflict, StorageFailed, Timeout
from ps.flush import Flush
from ps.job import Job
from ps.monitor import Monitor, Patience
from ps.opening import open_job, set_optimizer
from ps.options import ServerOptions
from ps.sessions import Session
from ps.step_wish import StepWish
from ps.store import CommitKey, DataDir, DiskFullError, OptimizerGroup, OptimizerSpec, StoredParameter, Written
from ps.tier import Incoming, Tier

CHUNKS = 4
OPTIONS: dict[str, Option] = {"lr": 1.0}


def chunk(index: int) -> Chunk:
    return Chunk(0, index, f"chunk {index}", (2,), torch.float32, 0)


# ---------------------------------------------------------------- the flush itself


def test_chunks_that_are_waited_for_are_handed_out_first() -> None:
    chunks = [chunk(i) for i in range(5)]
    flush = Flush("the commit", 0, chunks, Monitor())
    handed_out = iter(flush)
    assert next(handed_out) is chunks[0]
    with pytest.raises(Timeout, match="waited 0 s for the commit to write chunk 3"):
        flush.settle([chunks[3], chunks[4]], Patience.of(0))
    assert [c.index for c in handed_out] == [3, 4, 1, 2]
    assert [c.index for c in chunks if flush.awaits(c)] == [3, 4]


def test_a_chunk_is_held_until_it_was_taken_or_the_commit_is_over() -> None:
    chunks = [chunk(i) for i in range(3)]
    flush = Flush("the commit", 0, chunks, Monitor())
    for handed_out in flush:
        if handed_out is not chunks[2]:
            assert flush.holds([handed_out])
            flush.taken(handed_out)
            assert not flush.holds([handed_out])
    assert flush.holds(chunks) and flush.holds([chunks[2]])
    flush.end()
    assert not flush.holds(chunks)
    flush.settle(chunks, Patience.of(0))


# ---------------------------------------------------------------- a job whose disk waits to be told


class Disk:
    """Takes chunks only as they are let through."""

    def __init__(self, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        self.through = threading.Semaphore(0)
        self.begun = threading.Event()
        self.written: list[int] = []
        self.error: Exception | None = None
        store = job.generations._store
        self._write: Callable[..., Written] = store.write
        monkeypatch.setattr(store, "write", self.write)

    def write(self, header, chunks, arrays, taken, **options) -> Written:
        def one_by_one() -> Iterator:
            self.begun.set()
            for state in chunks:
                assert self.through.acquire(timeout=20)
                if self.error is not None:
                    raise self.error
                self.written.append(state.parameter)
                yield state

        return self._write(header, one_by_one(), arrays, taken, **options)

    def let_through(self, chunks: int) -> None:
        for _ in range(chunks):
            self.through.release()


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    with DataDir(tmp_path, 0, 1) as data_dir:
        job = Job("gpt", ServerOptions(0, 1), data_dir.job_store("gpt"), Tier(), lambda: 0)
        yield job
        job.close()


@pytest.fixture
def session(job: Job) -> Session:
    """Of a trainer whose parameters are all 0 and will be -1 after the first step, -2 after the second."""
    session = job.open_session(0, 1, "a", False, Patience.of(5), 1)
    # Of a size at which chunks are updated one by one.
    names = [StoredParameter(f"p{i}", (1 << 20,), torch.float32, "parameter", True) for i in range(CHUNKS)]
    open_job(job, session, names, {})
    shard = job.open_shard()
    job.write_weights(session, shard, 0, [(chunk, Incoming(torch.zeros(1 << 20), None)) for chunk in shard])
    group = OptimizerGroup(OPTIONS, tuple(range(CHUNKS)))
    set_optimizer(job, session, OptimizerSpec("SGD", (group,)), Patience.of(20))
    for chunk in shard:
        job.steps.add(
            session, job.steps.of(session), 0, 0, [Gradient(chunk, None, Incoming(torch.ones(1 << 20), None))]
        )
    return session


@pytest.fixture
def disk(job: Job, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(job, monkeypatch)


def announce(job: Job, session: Session, step: int, commit_id: str = "a") -> commits.CommitRequest:
    request = commits.CommitRequest(CommitKey(step, commit_id), "")
    commits.announce(job, session, request, Patience.of(20))
    return request


def step(job: Job, session: Session, number: int) -> None:
    job.step_from(session, number, StepWish((OPTIONS,), ()), Patience.of(20))


def wait_for(job: Job, version: int, chunks: int) -> None:
    """Until so many chunks are at a version."""
    shard = job.open_shard()
    job.monitor.wait_until(
        lambda: sum(c.version >= version for c in shard) >= chunks, Patience.of(20), lambda: "updates"
    )


def stored(job: Job, number: int) -> list[float]:
    return [float(state.weight[0]) for state in job.generations._store.read_chunks(number)]


def test_chunks_that_are_written_are_updated_while_the_others_are_not(job: Job, session: Session, disk: Disk) -> None:
    request = announce(job, session, 0)
    assert disk.begun.wait(20)
    step(job, session, 0)
    disk.let_through(2)
    wait_for(job, 1, 1)
    shard = job.open_shard()
    assert not all(c.version == 1 for c in shard)
    disk.let_through(CHUNKS)
    wait_for(job, 1, CHUNKS)
    commits.commit(job, session, request, Patience.of(20))
    assert stored(job, 0) == [0.0] * CHUNKS
    assert [float(c.weight.tensor[0]) for c in shard] == [-1.0] * CHUNKS


def test_no_update_passes_a_commit_that_was_announced_and_has_not_begun(job: Job, session: Session, disk: Disk) -> None:
    with job.disk(Patience.of(0)):  # Keeps it from beginning.
        request = announce(job, session, 0)
        step(job, session, 0)
        assert not disk.begun.wait(0.3)
        assert all(c.version == 0 for c in job.open_shard())
    disk.let_through(CHUNKS)
    commits.commit(job, session, request, Patience.of(20))
    assert stored(job, 0) == [0.0] * CHUNKS
    wait_for(job, 1, CHUNKS)


def test_no_weight_is_written_before_a_commit_that_was_announced(job: Job, session: Session, disk: Disk) -> None:
    disk.let_through(CHUNKS)
    shard = job.open_shard()
    with job.disk(Patience.of(0)):  # Keeps it from beginning.
        request = announce(job, session, 0)
        values = [(chunk, Incoming(torch.ones(1 << 20), None)) for chunk in shard]
        writing = threading.Thread(target=job.write_weights, args=(session, shard, 0, values))
        writing.start()
        writing.join(0.3)
        assert all(float(c.weight.tensor[0]) == 0.0 for c in shard)
    commits.commit(job, session, request, Patience.of(20))
    writing.join(20)
    assert stored(job, 0) == [0.0] * CHUNKS
    assert all(float(c.weight.tensor[0]) == 1.0 for c in shard)


def test_a_commit_that_fails_half_way_holds_up_nothing(job: Job, session: Session, disk: Disk) -> None:
    request = announce(job, session, 0)
    step(job, session, 0)
    disk.error = DiskFullError("the disk is full")
    disk.let_through(1)
    with pytest.raises(StorageFailed, match="the disk is full"):
        commits.commit(job, session, request, Patience.of(20))
    wait_for(job, 1, CHUNKS)
    assert job.generations.committed() == []
    disk.error = None
    disk.let_through(2 * CHUNKS)
    commits.commit(job, session, commits.CommitRequest(CommitKey(1, "b"), ""), Patience.of(20))
    assert stored(job, 1) == [-1.0] * CHUNKS


def test_a_commit_waits_for_the_one_before(job: Job, session: Session, disk: Disk) -> None:
    announce(job, session, 0)
    with pytest.raises(Timeout, match="waited 0.2 s for step 0, commit a of job 'gpt' to be committed"):
        commits.commit(job, session, commits.CommitRequest(CommitKey(0, "b"), ""), Patience.of(0.2))
    disk.let_through(CHUNKS)
    again = commits.commit(job, session, commits.CommitRequest(CommitKey(0, "b"), ""), Patience.of(20))
    assert again.key == CommitKey(0, "a")


def test_a_restore_waits_for_the_commit(job: Job, session: Session, disk: Disk) -> None:
    request = announce(job, session, 0)
    assert disk.begun.wait(20)
    with pytest.raises(Timeout, match="for a commit or a restore of job 'gpt' to end"):
        commits.restore(job, session, CommitKey(0, "a"), "0", Patience.of(0.2))
    disk.let_through(CHUNKS)
    commits.commit(job, session, request, Patience.of(20))
    commits.restore(job, session, CommitKey(0, "a"), "0", Patience.of(20))


def test_the_announced_step_must_not_be_past(job: Job, session: Session) -> None:
    step(job, session, 0)
    with pytest.raises(Exception, match="step 0 of job 'gpt' is gone"):
        announce(job, session, 0)


def test_a_change_while_the_commit_is_written_makes_the_next_one_new(job: Job, session: Session, disk: Disk) -> None:
    """What was written is not what is in memory then."""
    request = announce(job, session, 0)
    disk.let_through(1)
    shard = job.open_shard()
    first = next(iter(shard))
    job.write_weights(session, shard, 0, [(first, Incoming(torch.full((1 << 20,), 9.0), None))])
    disk.let_through(2 * CHUNKS)
    commits.commit(job, session, request, Patience.of(20))
    assert stored(job, 0) == [0.0] * CHUNKS
    assert (shard.generation, first.stored) == (None, None)
    second = commits.commit(job, session, commits.CommitRequest(CommitKey(0, "b"), ""), Patience.of(20))
    assert second.bytes_written == 4 << 20, "the others are linked"
    assert stored(job, 0) == [9.0, 0.0, 0.0, 0.0]
    with pytest.raises(Conflict, match="exists already"):
        job.write_weights(session, shard, 0, [(first, Incoming(torch.zeros(1 << 20), None))])
        commits.commit(job, session, commits.CommitRequest(CommitKey(0, "b"), ""), Patience.of(20))
