"""Servers whose memory is limited, seen from outside: what trainers, readers and operators notice."""

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import pytest
import torch

from protos import zero_ps_pb2 as pb
from protos import zero_ps_pb2_grpc
from ps import LocalCluster
from ps.tools.verification import verify
from tests.ps.client import Client, StreamError, error_of, start_job, to_bytes

PARAMETERS = {f"w{number}": torch.full((256, 256), float(number)) for number in range(32)}
"""8 MiB of weights in chunks of 256 KiB."""

MEMORY = 4 << 20


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(1, memory=MEMORY, lease=60) as cluster:
        yield cluster


def test_training_gives_the_bits_of_plain_torch(cluster: LocalCluster, job_name: str) -> None:
    clients = start_job(cluster.addresses[0], PARAMETERS, "AdamW", job=job_name, world_size=2, lr=0.1)
    plain = [weight.clone() for weight in PARAMETERS.values()]
    reference = torch.optim.AdamW(plain, lr=0.1, fused=True)
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        for number, weight in reversed(list(enumerate(plain))):
            one, two, more = (torch.randn(256, 256, generator=generator) for _ in range(3))
            # In 16 bits one contribution is kept as it is, and a second one makes it wide.
            clients[0].push_gradient(number, one.bfloat16(), step=step)
            if number % 2:
                clients[0].push_gradient(number, more.bfloat16(), step=step, sequence=1)
            clients[1].push_gradient(number, two, step=step)
            first = one.bfloat16().float() + more.bfloat16().float() if number % 2 else one.bfloat16().float()
            weight.grad = (first + two) / 2
        reference.step()
        for client in clients:
            client.step(step)
        for client in clients:
            client.call("ZeroGrad", step=step + 1)
        for number, weight in enumerate(plain):
            assert torch.equal(clients[0].pull(number, version=step + 1), weight)
            assert torch.equal(clients[1].pull(number, version=step + 1, dtype=torch.bfloat16), weight.bfloat16())
    status = status_of(cluster)
    assert status.peak_resident_bytes <= status.memory_limit_bytes == MEMORY
    assert status.spilled_bytes > 0
    assert f"of 4.0 MiB, {status.spilled_bytes / (1 << 20):.1f} MiB on disk" in table(cluster)


def test_gradients_that_nobody_zeroes_are_used_again_as_they_were_scaled(cluster: LocalCluster, job_name: str) -> None:
    """As in torch, where clipping changes `param.grad`; also where 16 bits were kept and scaling needs more."""
    with LocalCluster(1) as unlimited:
        results = []
        for address in (cluster.addresses[0], unlimited.addresses[0]):
            (client,) = start_job(address, PARAMETERS, job=job_name, lr=1.0)
            for number in range(len(PARAMETERS)):
                client.push_gradient(number, torch.full((256, 256), 1.7).bfloat16())
            client.step(0, edits=[pb.GradEdit(parameters=range(len(PARAMETERS)), scale=0.3)])
            client.step(1)
            results.append([client.pull(number, version=2) for number in range(len(PARAMETERS))])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_two_jobs_share_one_limit(cluster: LocalCluster, job_name: str) -> None:
    jobs = [start_job(cluster.addresses[0], PARAMETERS, job=f"{job_name}-{n}", lr=1.0)[0] for n in range(2)]
    for number in range(len(PARAMETERS)):
        for client in jobs:
            client.push_gradient(number, torch.ones(256, 256))
    for client in jobs:
        client.step(0)
    for client in jobs:
        for number, weight in enumerate(PARAMETERS.values()):
            assert torch.equal(client.pull(number, version=1), weight - 1)
    assert status_of(cluster).peak_resident_bytes <= MEMORY


def test_a_commit_is_restored_without_being_read_and_outlives_its_generation(
    cluster: LocalCluster, job_name: str
) -> None:
    (client,) = start_job(cluster.addresses[0], PARAMETERS, job=job_name, lr=1.0)
    client.call("Commit", step=0)
    read = status_of(cluster).spill_bytes_read
    client.call("Restore", step=0)
    client.set_optimizer(lr=1.0)
    assert status_of(cluster).spill_bytes_read == read
    generation = cluster.data_dirs[0] / job_name / "generations" / "00000000"
    before = {path: path.read_bytes() for path in generation.rglob("*") if path.is_file()}
    for number in range(0, len(PARAMETERS), 2):
        client.push_gradient(number, torch.ones(256, 256))
    client.step(0)
    client.pull(0, version=1)
    assert {path: path.read_bytes() for path in before} == before, "what is committed never changes"
    subprocess.run(["rm", "-r", str(generation)], check=True)
    for number, weight in enumerate(PARAMETERS.values()):
        assert torch.equal(client.pull(number, version=1), weight - (number + 1) % 2)


def test_weights_that_were_staged_are_spilled_too(cluster: LocalCluster, job_name: str) -> None:
    client = Client(cluster.addresses[0], job=job_name)
    stage(client, [weight.bfloat16() if n % 2 else weight for n, weight in enumerate(PARAMETERS.values())])
    open_staged(client)
    for number, weight in enumerate(PARAMETERS.values()):
        assert torch.equal(client.pull(number), weight)
    assert status_of(cluster).peak_resident_bytes <= MEMORY


def test_trainers_that_fall_silent_in_a_push_give_its_memory_back() -> None:
    """Four of them have all the memory that there is for data on its way in, until their leases end."""
    with LocalCluster(1, memory=MEMORY, lease=2) as cluster:
        silent = start_job(cluster.addresses[0], PARAMETERS, job="silent", world_size=4, lr=1.0)
        (other,) = start_job(cluster.addresses[0], PARAMETERS, job="other", lr=1.0)
        for client in silent:
            header = pb.PushHeader(
                session_id=client.session_id,
                kind=pb.PushHeader.KIND_GRADIENT,
                dtype=pb.DTYPE_FLOAT32,
                chunks=client.chunks(0),
            )
            client.pushes.requests.put(pb.PushRequest(header=header))
            client.pushes.requests.put(pb.PushRequest(data=bytes(100)))
        time.sleep(0.5)
        for client in silent:
            client.stop_beating()
        for number in range(len(PARAMETERS)):
            other.push_gradient(number, torch.ones(256, 256))
        # The pushes went on as soon as the first of them had lost its lease.
        deadline = time.monotonic() + 30
        while left := sum(len(job.sessions) for job in status_of(cluster).jobs if job.name == "silent"):
            assert time.monotonic() < deadline, f"{left} sessions are still there"
            time.sleep(0.1)


def test_a_lost_spill_file_fails_the_step_and_training_goes_on_from_the_commit(
    cluster: LocalCluster, job_name: str
) -> None:
    (client,) = start_job(cluster.addresses[0], PARAMETERS, job=job_name, lr=1.0)
    client.call("Commit", step=0)
    for number in range(len(PARAMETERS)):
        client.push_gradient(number, torch.ones(256, 256))
    for file in (cluster.data_dirs[0] / job_name / "working").glob("*/weight/*/c/*/*"):
        file.unlink()
    # Reading ahead may find out before the step begins.
    code, message = error_of(lambda: step_and_pull(client))
    assert code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.DATA_LOSS)
    assert "/working/shard-" in message and "No such file" in message and "start the trainers again" in message
    client.close()
    again = Client(cluster.addresses[0], job=job_name)
    assert again.opened.step == -1
    go_on(again)


def step_and_pull(client: Client) -> None:
    client.step(0)
    for number in range(len(PARAMETERS)):
        client.pull(number, version=1)


def test_a_restored_chunk_is_compared_with_its_checksum_when_it_is_first_read(
    cluster: LocalCluster, job_name: str
) -> None:
    """The restore itself reads none. A bit that changed on the disk is an error that names the generation's file."""
    (client,) = start_job(cluster.addresses[0], PARAMETERS, job=job_name, lr=1.0)
    client.call("Commit", step=0)
    train_a_step(client)
    damaged = cluster.data_dirs[0] / job_name / "generations/00000000/weight/w7/c/0/0"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    client.call("Restore", step=0)
    code, message = error_of(lambda: client.pull(7))
    # The latter if it was read ahead.
    assert code in (grpc.StatusCode.DATA_LOSS, grpc.StatusCode.INTERNAL)
    assert f"cannot read weight of chunk 0 of 'w7' back from {damaged}: its CRC32C is " in message
    assert "Put it back from a copy, or move its generation's folder away on every server" in message
    client.close()
    damaged.write_bytes(whole)
    go_on(Client(cluster.addresses[0], job=job_name))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for some 48 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_fails_the_step_and_training_goes_on_from_the_commit(small_disk: Path) -> None:
    with LocalCluster(1, data_dir=small_disk, memory=MEMORY) as cluster:
        (client,) = start_job(cluster.addresses[0], PARAMETERS, lr=1.0)
        client.call("Commit", step=0)
        for number in range(len(PARAMETERS)):
            client.push_gradient(number, torch.ones(256, 256))
        free = os.statvfs(small_disk)
        ballast = small_disk / "ballast"
        ballast.write_bytes(bytes(free.f_bavail * free.f_frsize - (1 << 20)))
        code, message = error_of(lambda: step_and_pull(client))
        assert code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.DATA_LOSS)
        assert "cannot spill" in message and "/working/shard-" in message and "the disk is full" in message
        assert "The last commit is untouched: free some space" in message
        client.close()
        ballast.unlink()
        go_on(Client(cluster.addresses[0]))


def test_a_full_disk_fails_a_push_and_loses_nothing(small_disk: Path) -> None:
    with LocalCluster(1, data_dir=small_disk, memory=MEMORY) as cluster:
        (client,) = start_job(cluster.addresses[0], PARAMETERS, lr=1.0)
        free = os.statvfs(small_disk)
        ballast = small_disk / "ballast"
        ballast.write_bytes(bytes(free.f_bavail * free.f_frsize - (1 << 20)))
        with pytest.raises(StreamError, match="cannot spill"):
            for number in range(len(PARAMETERS)):
                client.push_gradient(number, torch.ones(256, 256))
        client.close()
        ballast.unlink()
        again = Client(cluster.addresses[0])
        assert again.opened.step == 0, "the state in memory and on disk is whole"
        again.open_job(PARAMETERS)
        again.set_optimizer(lr=1.0)
        train_a_step(again)


def test_spills_are_spread_over_the_disks_and_linked_on_each(small_disk: Path, tmp_path: Path) -> None:
    """Half of the spill files are on each disk, no commit and no restore copies one to the other, and a start
    empties both."""
    disks = [tmp_path / "large", small_disk]
    with LocalCluster(1, data_dir=disks, memory=MEMORY) as cluster:
        (client,) = start_job(cluster.addresses[0], PARAMETERS, lr=1.0)
        client.call("Commit", step=0)
        train_a_step(client)
        client.call("Commit", step=1)
        assert verify(cluster.disks[0], all_steps=True).ok
        spilled = [weight_files(disk, "working") for disk in cluster.disks[0]]
        assert min(map(len, spilled)) > len(PARAMETERS) // 4
        cluster.kill(0)
        cluster.restart(0)
        assert not any(weight_files(disk, "working") for disk in cluster.disks[0])
        again = Client(cluster.addresses[0])
        again.call("Restore", step=1)
        for disk in cluster.disks[0]:
            linked = weight_files(disk, "working")
            assert len(linked) == len(PARAMETERS) // 2
            assert linked == weight_files(disk, "generations/00000001")
        again.open_job(PARAMETERS)
        for number, weight in enumerate(PARAMETERS.values()):
            assert torch.equal(again.pull(number, version=1), weight - 1)


def test_staged_weights_are_spread_over_the_disks_and_stay_on_theirs(small_disk: Path, tmp_path: Path) -> None:
    """A model under construction is spilled to where its chunks will live: moving them there is a rename."""
    with LocalCluster(1, data_dir=[tmp_path / "large", small_disk], memory=MEMORY) as cluster:
        client = Client(cluster.addresses[0])
        stage(client, list(PARAMETERS.values()))
        staged = [spilled_inodes(disk, "staging") for disk in cluster.disks[0]]
        assert min(map(len, staged)) > len(PARAMETERS) // 8, "about half of them do not fit"
        open_staged(client)
        for disk, files in zip(cluster.disks[0], staged, strict=True):
            assert files <= spilled_inodes(disk, "shard")
        for number, weight in enumerate(PARAMETERS.values()):
            assert torch.equal(client.pull(number), weight)


def spilled_inodes(data_dir: Path, area: str) -> set[int]:
    """The inodes of the chunk files below `working/` in the areas of a kind."""
    return {
        file.stat().st_ino for file in (data_dir / "job" / "working").glob(f"{area}-*/*/*/c/**/*") if file.is_file()
    }


def stage(client: Client, values: Sequence[torch.Tensor]) -> None:
    """Sends weights under ids from 100 on."""
    for number, value in enumerate(values):
        client.push(
            pb.PushHeader.KIND_STAGED,
            [pb.ChunkRef(parameter=100 + number, chunk=0)],
            to_bytes(value),
            dtype=value.dtype,
            chunk_bytes=[value.nbytes],
        )


def open_staged(client: Client) -> None:
    """Opens a job of PARAMETERS, all of which were staged."""
    specs = [
        pb.ParameterSpec(
            name=name,
            shape=weight.shape,
            dtype=pb.DTYPE_FLOAT32,
            kind=pb.ParameterSpec.KIND_PARAMETER,
            trainable=True,
            staging_id=100 + number,
        )
        for number, (name, weight) in enumerate(PARAMETERS.items())
    ]
    opened = client.call("OpenJob", manifest=pb.Manifest(parameters=specs))
    client.manifest = opened.manifest
    assert len(opened.bound) == len(PARAMETERS)


def weight_files(data_dir: Path, folder: str) -> set[int]:
    """The inodes of the chunk files of weights in a folder of the job."""
    return {file.stat().st_ino for file in (data_dir / "job" / folder).glob("**/weight/*/c/*/*")}


def go_on(client: Client) -> None:
    """From the commit of step 0, as if nothing had been."""
    client.call("Restore", step=0)
    client.open_job(PARAMETERS)
    client.set_optimizer(lr=1.0)
    train_a_step(client)


def train_a_step(client: Client) -> None:
    for number in range(len(PARAMETERS)):
        client.push_gradient(number, torch.ones(256, 256))
    client.step(0)
    for number, weight in enumerate(PARAMETERS.values()):
        assert torch.equal(client.pull(number, version=1), weight - 1)


def status_of(cluster: LocalCluster) -> pb.StatusResponse:
    with grpc.insecure_channel(cluster.addresses[0]) as channel:
        return zero_ps_pb2_grpc.ParameterServerStub(channel).Status(pb.StatusRequest(), timeout=10)


def table(cluster: LocalCluster) -> str:
    from tests.ps.test_cluster import zero_ps

    return zero_ps("status", cluster.addresses[0]).stdout
