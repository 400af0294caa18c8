"""Servers as processes: they start fast, end with their parent, and say what is wrong in one line."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos import zero_ps_pb2 as pb
from protos.sizes import format_bytes, parse_bytes
from ps import LocalCluster
from ps.address import split_address
from tests.ps.client import Client, error_of, start_job

ROOT = Path(__file__).parents[2]
# Not what gRPC was told in this process: the command has its own idea of how much it may say.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
ENVIRONMENT["PYTHONPATH"] = str(ROOT)


@pytest.fixture(scope="module", autouse=True)
def _not_forked() -> Iterator[None]:
    """The processes that users get."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ps.cluster.subprocess", subprocess)
        yield


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(1) as cluster:
        yield cluster


def zero_ps(*arguments: object, timeout: float = 30) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ps", *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT)


# ---------------------------------------------------------------- LocalCluster


def test_two_servers_are_ready_within_seconds() -> None:
    """Under two on an idle machine; here others may be at work."""
    began = time.monotonic()
    with LocalCluster(2) as cluster:
        ready = time.monotonic() - began
        assert len(set(cluster.addresses)) == 2
    assert ready < 15


def test_a_cluster_leaves_nothing_behind() -> None:
    with LocalCluster(2) as cluster:
        processes = [psutil.Process(cluster.pid(i)) for i in range(2)]
        folders = cluster.data_dirs
        client = Client(cluster.addresses[0], num_shards=2)
        assert all(folder.is_dir() for folder in folders)
    assert not any(process.is_running() for process in processes)
    assert not any(folder.exists() for folder in folders)
    client.drop()


def test_a_given_data_dir_stays_and_a_restart_finds_it(tmp_path: Path) -> None:
    with LocalCluster(1, data_dir=tmp_path) as cluster:
        (client,) = start_job(cluster.addresses[0], {"w": torch.ones(3)})
        client.call("Commit", timeout_seconds=10)
        address, pid = cluster.addresses[0], cluster.pid(0)
        cluster.kill(0)
        with pytest.raises(RuntimeError, match="not running"):
            cluster.pid(0)
        cluster.restart(0)
        assert cluster.addresses[0] == address
        assert cluster.pid(0) != pid
        assert Client(address).committed_steps == [0]
    assert (tmp_path / "shard-0" / "job").is_dir()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with (
        LocalCluster(1, data_dir=tmp_path) as first,
        pytest.raises(RuntimeError, match=f"pid {first.pid(0)} is using it"),
    ):
        LocalCluster(1, data_dir=tmp_path)


@pytest.mark.parametrize("fork", [False, True])
def test_servers_end_when_their_parent_is_killed(fork: bool) -> None:
    """Also while another process, forked from the parent, still holds its end of the pipe."""
    program = f"""
        import json, os, time
        from ps import LocalCluster
        cluster = LocalCluster(2)
        child = os.fork() if {fork} else None
        if child == 0:
            time.sleep(60)
        print(json.dumps([cluster.pid(0), cluster.pid(1), child]), flush=True)
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, env=ENVIRONMENT)
    *pids, child = json.loads(parent.stdout.readline())
    servers = [psutil.Process(pid) for pid in pids]
    try:
        assert all(server.is_running() for server in servers)
        parent.kill()
        parent.wait()
        _, alive = psutil.wait_procs(servers, timeout=30)
        assert not alive
    finally:
        parent.stdout.close()
        for pid in [child] if child else []:
            os.kill(pid, signal.SIGKILL)


# ---------------------------------------------------------------- a server's life


def test_a_server_leaves_on_sigterm_though_trainers_are_connected() -> None:
    with LocalCluster(1) as cluster:
        (client,) = start_job(cluster.addresses[0], {"w": torch.ones(3)})
        client.pull(0)
        process = psutil.Process(cluster.pid(0))
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.wait(10)
        assert time.monotonic() - began < 8, "an idle stream is nothing to wait for"
        assert error_of(lambda: client.call("Heartbeat"))[0] == grpc.StatusCode.UNAVAILABLE


def test_sigterm_lets_a_call_finish_and_a_second_one_does_not() -> None:
    with LocalCluster(1) as cluster:
        client = Client(cluster.addresses[0], world_size=2, group=1)
        process = psutil.Process(cluster.pid(0))
        call = client.stub.Barrier.future(pb.BarrierRequest(session_id=client.session_id, tag="t", timeout_seconds=1.5))
        client.call("Heartbeat")  # The server has the call before it.
        process.send_signal(signal.SIGTERM)
        assert call.exception().code() == grpc.StatusCode.DEADLINE_EXCEEDED, "it got its own answer"
        process.wait(30)
        cluster.restart(0)
        client = Client(cluster.addresses[0], world_size=2, group=1)
        process = psutil.Process(cluster.pid(0))
        call = client.stub.Barrier.future(pb.BarrierRequest(session_id=client.session_id, tag="t", timeout_seconds=60))
        client.call("Heartbeat")
        known, deadline = cluster.log(0).count("stops"), time.monotonic() + 20
        process.send_signal(signal.SIGTERM)
        while cluster.log(0).count("stops") == known:
            assert time.monotonic() < deadline, "the server does not hear of the signal"
            time.sleep(0.01)
        assert process.is_running()
        process.send_signal(signal.SIGTERM)
        # The call would wait for a minute.
        process.wait(30)


def test_health_and_reflection_are_served(cluster: LocalCluster) -> None:
    with grpc.insecure_channel(cluster.addresses[0]) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "zero_ps.v1.ParameterServer"):
            response = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
            assert response.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (response,) = reflection.ServerReflectionInfo(iter([request]), timeout=5)
        names = {service.name for service in response.list_services_response.service}
        assert "zero_ps.v1.ParameterServer" in names


def test_status_says_what_is_held_and_who_is_there(cluster: LocalCluster, job_name: str) -> None:
    clients = start_job(cluster.addresses[0], {"w": torch.ones(1000)}, world_size=2, job=job_name)
    before = clients[0].stub.Status(pb.StatusRequest())
    clients[0].pull(0)
    after = clients[0].stub.Status(pb.StatusRequest())
    assert (after.shard, after.num_shards) == (0, 1)
    assert after.data_dir == str(cluster.data_dirs[0])
    assert after.bytes_pulled - before.bytes_pulled == 4000
    assert before.bytes_pushed >= 4000
    actual = psutil.Process(cluster.pid(0)).memory_info().rss
    assert abs(after.rss_bytes - actual) < 64 << 20
    assert after.peak_rss_bytes >= after.rss_bytes
    (job,) = (job for job in after.jobs if job.name == job_name)
    assert (job.step, job.parameters, job.chunks, job.resident_bytes) == (0, 1, 1, 4000)
    assert sorted(session.rank for session in job.sessions) == [0, 1]


# ---------------------------------------------------------------- the command


def test_a_port_in_use_is_one_line_and_status_2(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = zero_ps("serve", "--data-dir", tmp_path, "--listen", f"127.0.0.1:{port}")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == (
        f"zero-ps serve: cannot listen on 127.0.0.1:{port}: Address already in use; choose another --listen\n"
    )


def test_the_port_of_another_server_is_in_use_too(cluster: LocalCluster, tmp_path: Path) -> None:
    result = zero_ps("serve", "--data-dir", tmp_path, "--listen", cluster.addresses[0])
    assert result.returncode == 2
    assert "Address already in use" in result.stderr


def test_the_data_of_another_shard_is_refused(tmp_path: Path) -> None:
    with LocalCluster(1, data_dir=tmp_path):
        pass
    result = zero_ps("serve", "--data-dir", tmp_path / "shard-0", "--shard", "1/2", "--listen", "127.0.0.1:0")
    assert result.returncode == 2
    assert "it holds shard 0/1" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_data_dir_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = zero_ps("serve", "--data-dir", tmp_path / "file" / "x", "--listen", "127.0.0.1:0")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert f"cannot open {tmp_path}/file/x" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shard", "2/2"], "'2/2' is not a shard: write I/N"),
        (["--shard", "x"], "'x' is not a shard"),
        (["--shard", "-1/2"], "shard"),
        (["--listen", "7070"], "'7070' is not an address: write HOST:PORT"),
        (["--listen", "127.0.0.1:99999"], "is not an address"),
        (["--memory", "lots"], "'lots' is not a size"),
        (["--memory", "-1GiB"], "memory"),
        (["--threads", "0"], "'0' is not a positive number"),
        (["--keep", "none"], "'none' is not a positive number"),
        (["--lease", "0"], "'0' is not a time"),
        (["--lease", "nan"], "'nan' is not a time"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_a_wrong_argument_is_one_line_and_status_2(tmp_path: Path, arguments: list[str], words: str) -> None:
    result = zero_ps("serve", "--data-dir", tmp_path, *arguments)
    assert result.returncode == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_help_names_every_command() -> None:
    result = zero_ps("--help")
    assert result.returncode == 0
    assert all(command in result.stdout for command in ("serve", "status", "train", "demo"))
    help_of_serve = zero_ps("serve", "--help").stdout
    assert all(flag in help_of_serve for flag in ("--shard", "--data-dir", "--memory", "--lease", "--keep"))
    assert "stdin" not in help_of_serve


def test_the_status_command_prints_a_table(cluster: LocalCluster, job_name: str) -> None:
    start_job(cluster.addresses[0], {"w": torch.ones(3)}, job=job_name)
    result = zero_ps("status", cluster.addresses[0])
    assert result.returncode == 0
    headings, *rows = result.stdout.splitlines()
    assert headings.split()[:3] == ["ADDRESS", "SHARD", "MEMORY"]
    (row,) = (row for row in rows if f" {job_name} " in row)
    assert row.split()[:2] == [cluster.addresses[0], "0/1"]
    assert "  1 of 1  " in row and "  1 grpc (shm: " in row


def test_the_status_of_a_server_that_is_not_there(cluster: LocalCluster) -> None:
    result = zero_ps("status", f"{cluster.addresses[0]},127.0.0.1:1", "--timeout", "2")
    assert result.returncode == 1
    assert "127.0.0.1:1" in result.stdout
    assert "no answer (UNAVAILABLE: " in result.stdout
    assert "Connection refused" in result.stdout
    assert cluster.addresses[0] in result.stdout


def test_the_status_of_what_is_no_address_is_refused_before_any_call(cluster: LocalCluster) -> None:
    for address, words in (("localhost", "write HOST:PORT"), ("::1:7070", "[::1]:7070")):
        result = zero_ps("status", cluster.addresses[0], address)
        assert result.returncode == 2
        assert words in result.stderr
        assert not result.stdout


def test_the_status_of_a_name_that_does_not_resolve() -> None:
    result = zero_ps("status", "nosuchhost.invalid:7070", "--timeout", "5")
    assert result.returncode == 1
    assert "nosuchhost.invalid" in result.stdout.partition("no answer (")[2]


def test_listening_on_a_name_that_does_not_resolve(tmp_path: Path) -> None:
    result = zero_ps("serve", "--data-dir", tmp_path, "--listen", "nosuchhost.invalid:7172", "--insecure")
    assert result.returncode == 2
    assert "the name 'nosuchhost.invalid' does not resolve" in result.stderr


def test_a_data_dir_that_is_a_file_or_nothing_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("")
    for text, words in ((file, "notes.txt' is a file"), ("", "the name is empty")):
        result = zero_ps("serve", "--data-dir", text)
        assert result.returncode == 2
        assert words in result.stderr
        assert result.stderr.count("\n") == 1


# ---------------------------------------------------------------- memory


def test_a_chunk_that_can_never_fit_is_refused_with_both_sizes_and_the_least_that_would_do() -> None:
    with LocalCluster(1, memory="20MiB") as cluster:
        client = Client(cluster.addresses[0], job="large")
        code, message = error_of(lambda: client.open_job({"w": torch.zeros(1, 3_000_000)}))
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "chunk 0 of 'w' comes in 11.4 MiB at once" in message
        assert "5.0 MiB, a quarter of its --memory of 20.0 MiB; start it with --memory" in message
        client = Client(cluster.addresses[0], job="state")
        client.open_job({"w": torch.zeros(1, 1_200_000)})
        code, message = error_of(lambda: client.set_optimizer("AdamW"))
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "an update of chunk 0 of 'w' needs 32.0 MiB in memory at once" in message
        assert "this server has 15.0 MiB for that" in message
        client.set_optimizer("SGD")


def test_what_is_too_small_to_spill_has_to_fit() -> None:
    with LocalCluster(1, memory="1MiB") as cluster:
        client = Client(cluster.addresses[0], job="small")
        code, message = error_of(lambda: client.open_job({f"w{n}": torch.zeros(10_000) for n in range(8)}))
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "that cannot be spilled" in message


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("8GiB", 8 << 30), ("1.5 MiB", 3 << 19), ("500MB", 500_000_000), ("2kib", 2048), ("7B", 7)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "1 GiBi", "-1", "0", "nan", "1e999", "1 XB", "1 2"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)


def test_sizes_are_written() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 5 << 30, 3 << 41)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 GiB",
        "6.0 TiB",
    ]


def test_addresses_are_read() -> None:
    assert split_address("localhost:70") == ("localhost", 70)
    assert split_address("[::1]:70") == ("[::1]", 70)
    with pytest.raises(ValueError, match=r"in brackets, \[::1\]:70"):
        split_address("::1:70")
    for text in ("", ":70", "a", "a:", "a:b", "a:70000", "a:\u00b2"):
        with pytest.raises(ValueError, match="is not an address"):
            split_address(text)
