"""The storage tier against the disk that it is on: what a server whose shard is larger than its memory gets.

All but the memory of a server is measured in one process, without a network: what is compared is the server's
own work with what the disk does for the same bytes in the same run, read and written past the page cache.
"""

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import grpc
import torch
from torch import nn

import trainer
from benchmarks import report
from protos import zero_ps_pb2 as pb
from protos import zero_ps_pb2_grpc
from ps import LocalCluster, commits
from ps.contributions import Gradient
from ps.job import Job
from ps.jobs import Jobs
from ps.monitor import Patience
from ps.opening import open_job, set_optimizer
from ps.options import ServerOptions
from ps.pull import answer_pulls
from ps.sessions import Session
from ps.step_wish import StepWish
from ps.store import CommitKey, DataDir, OptimizerGroup, OptimizerSpec, StoredParameter, direct
from ps.tier import Tier, policy_named
from ps.tier.buffers import Buffer
from ps.traffic import Traffic

MIB = 1 << 20
WIDTH = 1024
"""One parameter is a matrix of WIDTH x WIDTH in fp32: one chunk of 4 MiB."""

STATES_PER_WEIGHT = 4
"""Weight, gradient, and AdamW's two: what a shard has in all, in weights."""

PATIENCE = 600.0


def run(quick: bool) -> list[report.Row]:
    """The rows of cold pulls, optimizer passes and policies in a server's own code, and of a server process. Files are
    in ZERO_PS_BENCH_DIR, or where temporary files are."""
    torch.set_num_threads(1)
    matrices = 48 if quick else 192
    rows = []
    with tempfile.TemporaryDirectory(prefix="zero-ps-bench-", dir=os.environ.get("ZERO_PS_BENCH_DIR")) as folder:
        rows += cold_pull(Path(folder), 2 * matrices)
        rows += optimizer_pass(Path(folder), matrices)
        rows += policies(Path(folder), matrices // 2)
        rows += peak_memory(Path(folder), (48, 96) if quick else (128, 512))
    return rows


# ---------------------------------------------------------------- cold pull


def cold_pull(folder: Path, matrices: int) -> list[report.Row]:
    """All weights of a shard that was just restored, so that all of it is on disk only, against reading the same
    files. Checksums are compared, as they are the first time."""
    weights = matrices * WIDTH * WIDTH * 4
    with server(folder / "pull", limited(weights // 4)) as (jobs, job):
        session = opened(jobs, matrices)
        commits.commit(job, session, commits.CommitRequest(CommitKey(0, "a"), ""), Patience.of(PATIENCE))
        job.close_session(session)
    files = sorted((folder / "pull/bench/generations/00000000/weight").glob("*/c/*/*"))
    raw, pull = [], []
    for _ in range(5):
        with server(folder / "pull", limited(weights // 4)) as (jobs, job):
            session = jobs.open_session("bench", 0, 1, "again", False, Patience.of(5), 2)[1]
            commits.restore(job, session, CommitKey(0, "a"), "b", Patience.of(PATIENCE))
            drop_caches(files)
            raw.append(timed(lambda: raw_io(files, [])))
            drop_caches(files)
            pull.append(timed(partial(pull_all, jobs, session, matrices, 0)))
            assert jobs.tier.bytes_read == weights, "something was in memory"
    seconds = min(pull)
    return [
        report.Row(
            "cold pull",
            weights / seconds / MIB,
            "MiB/s",
            "raw O_DIRECT read",
            min(raw) / seconds,
            at_least=0.85,
            case={"mib": weights // MIB, "memory_mib": weights // 4 // MIB},
        )
    ]


def pull_all(jobs: Jobs, session: Session, matrices: int, version: int) -> None:
    """What a link is given to send."""
    requests = [
        pb.PullRequest(
            session_id=session.id,
            request_id=number,
            version=version,
            chunks=[pb.ChunkRef(parameter=number, chunk=0)],
            timeout_seconds=PATIENCE,
        )
        for number in range(matrices)
    ]
    answered(jobs, requests)


def answered(jobs: Jobs, requests: Sequence[pb.PullRequest]) -> None:
    """Has pulls answered as a stream would, to nobody."""
    with jobs.places.stream(lambda: None) as place:
        for response in answer_pulls(jobs, Traffic(), requests, place, lambda: False):
            assert isinstance(response, bytes) or not response.HasField("error"), response


# ---------------------------------------------------------------- optimizer


def optimizer_pass(folder: Path, matrices: int) -> list[report.Row]:
    """AdamW over a shard ten times the memory, against the disk moving the same bytes in the same mix."""
    parameters = matrices * WIDTH * WIDTH
    memory = STATES_PER_WEIGHT * parameters * 4 // 10
    ratios, moved, seconds = [], 0.0, []
    with server(folder / "pass", limited(memory)) as (jobs, job):
        session = opened(jobs, matrices)
        adamw(job, session, matrices)
        gradients(job, session, matrices, 0)
        update(job, session, 0)
        for step in range(1, 4):
            gradients(job, session, matrices, step)
            read, written = jobs.tier.bytes_read, jobs.tier.bytes_written
            took = timed(partial(update, job, session, step))
            read, written = jobs.tier.bytes_read - read, jobs.tier.bytes_written - written
            ratios.append(disk_seconds(folder, read, written) / took)
            seconds.append(took)
            moved = (read + written) / parameters
        peak = jobs.tier.peak_bytes
    case: dict[str, str | int | float] = {"parameters_m": parameters // 10**6, "memory_mib": memory // MIB}
    best = max(range(len(ratios)), key=ratios.__getitem__)
    return [
        report.Row(
            "optimizer pass", seconds[best], "s", "the disk for the same bytes", ratios[best], at_least=0.75, case=case
        ),
        report.Row("bytes moved", moved, "B/parameter", "all of 28", moved / 28, case=case),
        report.Row("counted memory, peak", peak / MIB, "MiB", "the limit", peak / memory, at_most=1, case=case),
    ]


def gradients(job: Job, session: Session, matrices: int, step: int) -> None:
    """One contribution to every chunk, last ones first, as backward sends them."""
    shard = job.open_shard()
    contributions = job.steps.of(session)
    job.steps.zero(session, shard, step, list(shard))
    for chunk in reversed(list(shard)):
        incoming = job.tier.incoming(chunk.shape, torch.float32, chunk.label)
        incoming.tensor.fill_(0.01)
        job.used(session, shard, "gradient", chunk, step)
        job.steps.add(session, contributions, step, 0, [Gradient(chunk, None, incoming)])


def update(job: Job, session: Session, step: int) -> None:
    """Makes a step, and waits until all of it is done."""
    groups = ({"lr": 1e-3},)
    job.step_from(session, step, StepWish(groups, ()), Patience.of(PATIENCE))
    shard = job.shard
    assert shard is not None
    job.steps.zero(session, shard, step + 1, list(shard))
    job.wait_at_rest(shard, session, Patience.of(PATIENCE))
    job.open_shard()


def adamw(job: Job, session: Session, matrices: int) -> None:
    """Gives a job of so many matrices its optimizer."""
    group = OptimizerGroup({"lr": 1e-3}, tuple(range(matrices)))
    set_optimizer(job, session, OptimizerSpec("AdamW", (group,)), Patience.of(PATIENCE))


# ---------------------------------------------------------------- eviction


def policies(folder: Path, matrices: int) -> list[report.Row]:
    """Bytes read in a step of training: forward, backward, update; by the plan, and by last use."""
    read = {}
    for policy in ("plan", "lru"):
        memory = STATES_PER_WEIGHT * matrices * WIDTH * WIDTH * 4 // 4
        with server(folder / policy, limited(memory, policy)) as (jobs, job):
            session = opened(jobs, matrices)
            adamw(job, session, matrices)
            for step in range(3):
                before = jobs.tier.bytes_read
                pull_all(jobs, session, matrices, step)
                backward(jobs, job, session, matrices, step)
                update(job, session, step)
            read[policy] = jobs.tier.bytes_read - before
    case: dict[str, str | int | float] = {"memory": "a quarter of the shard"}
    return [
        report.Row("read in a step, plan", read["plan"] / MIB, "MiB", "lru", read["plan"] / read["lru"], case=case),
        report.Row("read in a step, lru", read["lru"] / MIB, "MiB", case=case),
    ]


def backward(jobs: Jobs, job: Job, session: Session, matrices: int, step: int) -> None:
    """Pulls every matrix and pushes its gradient, the last one first."""
    shard = job.open_shard()
    contributions = job.steps.of(session)
    job.steps.zero(session, shard, step, list(shard))
    for number in reversed(range(matrices)):
        request = pb.PullRequest(
            session_id=session.id,
            version=step,
            chunks=[pb.ChunkRef(parameter=number, chunk=0)],
            timeout_seconds=PATIENCE,
        )
        answered(jobs, [request])
        chunk = shard.find(number, 0)
        incoming = job.tier.incoming(chunk.shape, torch.float32, chunk.label)
        incoming.tensor.fill_(0.01)
        job.used(session, shard, "gradient", chunk, step)
        job.steps.add(session, contributions, step, 0, [Gradient(chunk, None, incoming)])


# ---------------------------------------------------------------- memory of a server


def peak_memory(folder: Path, limits_mib: Sequence[int]) -> list[report.Row]:
    """The process of a server that trains a shard ten times its limit, against one that has no job."""
    rows = []
    for limit in limits_mib:
        with LocalCluster(1, data_dir=folder / f"peak-{limit}", memory=limit * MIB) as cluster:
            idle = status_of(cluster).peak_rss_bytes
            train(cluster.addresses, limit * 10 * MIB // STATES_PER_WEIGHT // (WIDTH * WIDTH * 4))
            status = status_of(cluster)
        beyond = status.peak_rss_bytes - idle - limit * MIB
        case: dict[str, str | int | float] = {"limit_mib": limit, "idle_mib": idle // MIB}
        rows += [
            report.Row("server process, peak", status.peak_rss_bytes / MIB, "MiB", case=case),
            report.Row("beyond idle and the limit", beyond / MIB, "MiB", "the limit", beyond / MIB / limit, case=case),
        ]
    return rows


def train(addresses: Sequence[str], layers: int) -> None:
    """Two steps of AdamW and a commit."""
    with trainer.connect(addresses, job="peak") as job:
        with job.init():
            model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
        trainer.offload(model, job)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-3)
        for _ in range(2):
            model(torch.randn(4, WIDTH)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        job.commit()


def status_of(cluster: LocalCluster) -> pb.StatusResponse:
    """What the one server of a cluster says of itself."""
    with grpc.insecure_channel(cluster.addresses[0]) as channel:
        return zero_ps_pb2_grpc.ParameterServerStub(channel).Status(pb.StatusRequest(), timeout=10)


# ---------------------------------------------------------------- a server without a network


@contextmanager
def server(folder: Path, tier: Tier) -> Iterator[tuple[Jobs, Job]]:
    """A server's jobs, and one of them, without a network."""
    with DataDir(folder, 0, 1) as data_dir:
        jobs = Jobs(ServerOptions(0, 1, lease_seconds=1e6), data_dir, tier)
        job, session = jobs.open_session("bench", 0, 1, "first", False, Patience.of(5), 1)
        job.close_session(session)
        try:
            yield jobs, job
        finally:
            jobs.close()
            tier.close()


def limited(memory: int, policy: str = "plan") -> Tier:
    """A tier with a limit, in bytes."""
    return Tier(memory, policy_named(policy))


def opened(jobs: Jobs, matrices: int) -> Session:
    """A session whose job has all its weights."""
    job, session = jobs.open_session("bench", 0, 1, "trainer", False, Patience.of(5), 2)
    manifest = [StoredParameter(f"w{n}", (WIDTH, WIDTH), torch.float32, "parameter", True) for n in range(matrices)]
    open_job(job, session, manifest, {})
    shard = job.open_shard()
    generator = torch.Generator().manual_seed(0)
    for chunk in shard:
        incoming = job.tier.incoming(chunk.shape, torch.float32, chunk.label)
        torch.randn(chunk.shape, generator=generator, out=incoming.tensor)
        job.write_weights(session, shard, 0, [(chunk, incoming)])
    return session


# ---------------------------------------------------------------- the disk by itself


def disk_seconds(folder: Path, read: int, written: int) -> float:
    """The time that the disk takes to read and write so many bytes at once, in files of 4 MiB."""
    size = WIDTH * WIDTH * 4
    scratch = folder / "raw"
    scratch.mkdir(exist_ok=True)
    sources = [scratch / f"r{number}" for number in range(-(-read // size))]
    targets = [scratch / f"w{number}" for number in range(-(-written // size))]
    # Files that exist: where a server's spill files are in the steady state.
    raw_io([], [path for path in (*sources, *targets) if not path.exists()])
    return timed(lambda: raw_io(sources, targets))


def raw_io(sources: Sequence[Path], targets: Sequence[Path], threads: int = 8) -> None:
    """Reads files whole and writes others, at the same time and past the page cache."""
    size = WIDTH * WIDTH * 4
    buffers = threading.local()

    def view() -> memoryview:
        if not hasattr(buffers, "view"):
            buffers.buffer = Buffer(size)
            buffers.buffer.data.random_(0, 255)
            buffers.view = buffers.buffer.data.numpy().data
        found: memoryview = buffers.view
        return found

    def read(path: Path) -> None:
        direct.read_file(str(path), view(), size, size)

    def write(path: Path) -> None:
        direct.write_file(str(path), view(), size, size)

    with ThreadPoolExecutor(threads) as readers, ThreadPoolExecutor(threads) as writers:
        for done in [*(readers.submit(read, p) for p in sources), *(writers.submit(write, p) for p in targets)]:
            done.result()


def drop_caches(files: Sequence[Path]) -> None:
    """Takes the files out of the page cache."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def timed(work: Callable[[], None]) -> float:
    """Seconds."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


if __name__ == "__main__":
    sys.exit(report.main(__doc__, run))
