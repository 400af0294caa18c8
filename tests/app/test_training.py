"""The training application with real servers and several trainers."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ps import LocalCluster
from tests.ranks import free_port

TINY = ["--layers", "1", "--width", "32", "--heads", "2", "--context", "16", "--batch", "4", "--dtype", "fp32"]


def start(
    cluster: LocalCluster,
    rank: int,
    world_size: int,
    *flags: str,
    environment: Mapping[str, str] | None = None,
) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", "--servers", ",".join(cluster.addresses), *TINY, *flags],
        env={
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "OMP_NUM_THREADS": "1",
            **(environment or {}),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(cluster: LocalCluster, world_size: int, *flags: str, **options: Any) -> list[str]:
    """What each rank said; all of them have to succeed."""
    processes = [start(cluster, rank, world_size, *flags, **options) for rank in range(world_size)]
    said = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * world_size, "\n".join(said)
    return said


def steps_of(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_two_trainers_train_and_report(cluster: LocalCluster, job_name: str, tmp_path: Path) -> None:
    log, path = tmp_path / "log.jsonl", tmp_path / "deep" / "summary.json"
    flags = ["--job", job_name, "--steps", "12", "--lr", "0.01", "--step-log", str(log), "--summary", str(path)]
    said = run(cluster, 2, *flags, "--clip", "1.0", "--links", "gloo,grpc")
    summary = json.loads(path.read_text())
    assert summary["steps"] == 12
    assert summary["first_loss"] == pytest.approx(math.log(256), abs=1), "about a uniform guess"
    assert summary["last_loss"] < summary["first_loss"]
    assert set(summary["peak_rss_bytes"]) == {"trainer-0", "trainer-1"}
    assert min(summary["peak_rss_bytes"].values()) > 1 << 20
    assert not summary["interrupted"]
    assert [line["step"] for line in steps_of(log)] == list(range(1, 13))
    # Both trainers pull the model for each step and push a gradient for all of it.
    assert summary["bytes_pushed"] >= 12 * 2 * 4 * summary["parameters"]
    assert sum(line["bytes_pushed"] for line in steps_of(log)) <= summary["bytes_pushed"]
    assert "committed step 12" in said[0]
    assert "gloo (shm: the trainer does not allow it (links of trainer.connect)" in said[0]
    assert "step" not in said[1], "only rank 0 reports"


def test_trainers_of_torchrun_may_be_a_group(cluster: LocalCluster, job_name: str, tmp_path: Path) -> None:
    losses = {}
    for mode in ("direct", "group"):
        log = tmp_path / f"{mode}.jsonl"
        flags = ["--job", f"{job_name}-{mode}", "--steps", "3", "--links", "grpc", "--mode", mode]
        torchrun = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        said = run(cluster, 2, *flags, "--step-log", str(log), environment=torchrun)
        assert re.search(rf"^mode +{mode}$", said[0], re.MULTILINE), said[0]
        losses[mode] = [line["loss"] for line in steps_of(log)]
    assert losses["direct"] == losses["group"]


def test_trainers_have_to_agree_how_far_they_may_be_ahead(cluster: LocalCluster, job_name: str) -> None:
    flags = ["--job", job_name, "--steps", "3", "--recover-timeout", "0", "--max-staleness"]
    processes = [start(cluster, rank, 2, *flags, str(rank + 1)) for rank in range(2)]
    said = "".join(process.communicate(timeout=100)[0] for process in processes)
    assert 0 not in [process.returncode for process in processes]
    assert "max_staleness" in said


def test_a_second_run_sees_the_data_and_makes_the_steps_of_one_that_never_stopped(
    cluster: LocalCluster, job_name: str, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    # --warmup as long as the run: the learning rate of a step is then the same whatever --steps is.
    flags = ["--warmup", "8", "--commit-every", "0"]
    run(cluster, 1, *flags, "--job", f"{job_name}-whole", "--steps", "8", "--step-log", str(whole))
    run(cluster, 1, *flags, "--job", job_name, "--steps", "4", "--step-log", str(parts))
    (said,) = run(cluster, 1, *flags, "--job", job_name, "--steps", "8", "--step-log", str(parts))
    assert "going on at step 4" in said
    losses = [[line["loss"] for line in steps_of(log)] for log in (whole, parts)]
    assert losses[0] == losses[1]

    (said,) = run(cluster, 1, *flags, "--job", job_name, "--steps", "8", "--step-log", str(parts), "--seed", "5")
    assert "not the same data as before: seed 0 -> 5" in said
    assert "has made 8 steps already" in said
    assert len(steps_of(parts)) == 8


def test_ctrl_c_commits_and_says_how_to_go_on(cluster: LocalCluster, job_name: str, tmp_path: Path) -> None:
    log, path = tmp_path / "log.jsonl", tmp_path / "summary.json"
    flags = ["--job", job_name, "--steps", "100000", "--commit-every", "0"]
    processes = [start(cluster, rank, 2, *flags, "--step-log", str(log), "--summary", str(path)) for rank in range(2)]
    until = time.monotonic() + 60
    while not (log.exists() and len(log.read_text().splitlines()) >= 3):
        assert time.monotonic() < until
        assert [process.poll() for process in processes] == [None, None]
        time.sleep(0.02)
    # To one rank only: the other has to stop with it, after the same step.
    processes[1].send_signal(signal.SIGINT)
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [130, 130], said
    summary = json.loads(path.read_text())
    assert summary["interrupted"]
    assert f"step {summary['steps']} of 100000 is committed" in said[0]
    assert summary["steps"] == steps_of(log)[-1]["step"]
    (said_later,) = run(cluster, 1, "--job", job_name, "--steps", str(summary["steps"] + 1))
    assert f"going on at step {summary['steps']}" in said_later


def test_another_model_under_the_same_job_is_refused_in_one_line(cluster: LocalCluster, job_name: str) -> None:
    run(cluster, 1, "--job", job_name, "--steps", "1")
    other = start(cluster, 0, 1, "--job", job_name, "--steps", "2", "--width", "48")
    said = other.communicate(timeout=60)[0]
    assert other.returncode == 2, said
    assert said.count("\n") == 1
    assert "tokens.weight" in said


def test_a_log_that_cannot_be_written_ends_it_before_training_begins(cluster: LocalCluster, job_name: str) -> None:
    process = start(cluster, 0, 1, "--job", job_name, "--step-log", "/proc/foo/log")
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 2, said
    assert said.splitlines()[-1] == "zero-ps train (rank 0): [Errno 2] No such file or directory: '/proc/foo'"


def test_a_server_that_dies_ends_training_with_1_and_says_where_it_goes_on(job_name: str, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    flags = ["--job", job_name, "--steps", "100000", "--commit-every", "2", "--step-log", str(log)]
    flags += ["--recover-timeout", "0"]
    with LocalCluster(servers=2, data_dir=tmp_path / "state") as cluster:
        processes = [start(cluster, rank, 2, *flags) for rank in range(2)]
        until = time.monotonic() + 60
        while not (log.exists() and len(log.read_text().splitlines()) >= 5):
            assert time.monotonic() < until
            ended = [process for process in processes if process.poll() is not None]
            assert not ended, ended[0].communicate()[0]
            time.sleep(0.02)
        cluster.kill(1)
        said = [process.communicate(timeout=60)[0] for process in processes]
        assert [process.returncode for process in processes] == [1, 1], said
        found = re.search(
            r"^zero-ps train \(rank 0\): .*Training ended after step (\d+); the last commit is at step (\d+)\. "
            r"The same command goes on from the newest step that all servers have$",
            said[0],
            re.MULTILINE,
        )
        assert found is not None, said[0]
        assert "the last commit is at step" in said[1]
        made, committed = int(found[1]), int(found[2])
        assert committed <= made <= committed + 2
        assert committed % 2 == 0

        cluster.restart(1)
        (later,) = run(cluster, 1, "--job", job_name, "--steps", str(made + 3))
        # A generation that was on its way when the server died may have become complete.
        assert re.search(rf"going on at step ({committed}|{committed + 2})$", later, re.MULTILINE), later


def test_training_goes_on_when_a_server_comes_back_and_stops_for_sigterm(job_name: str, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    flags = ["--job", job_name, "--steps", "100000", "--commit-every", "2", "--step-log", str(log)]

    def wait_for(step: int) -> None:
        until = time.monotonic() + 120
        while not (log.exists() and any(line["step"] >= step for line in steps_of(log))):
            assert time.monotonic() < until
            assert [process.poll() for process in processes] == [None, None], processes[0].communicate()[0]
            time.sleep(0.05)

    with LocalCluster(servers=2, data_dir=tmp_path / "state") as cluster:
        processes = [start(cluster, rank, 2, *flags) for rank in range(2)]
        wait_for(5)
        cluster.kill(1)
        cluster.restart(1)
        made = steps_of(log)[-1]["step"]
        wait_for(made + 5)
        processes[0].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=100)[0] for process in processes]
        # It was sent to one of them, and both say why they stopped.
        assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 2, said
        assert re.search(r"^lost at step \d+: server ", said[0], re.MULTILINE), said[0]
        assert re.search(r"^going on at step \d+, from a commit$", said[0], re.MULTILINE), said[0]
        assert [line["step"] for line in steps_of(log)] == list(range(1, len(steps_of(log)) + 1))


def test_a_second_sigterm_ends_training_at_once_though_a_server_hangs(job_name: str, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    flags = ["--job", job_name, "--steps", "100000", "--commit-every", "1", "--step-log", str(log)]
    with LocalCluster(servers=1, data_dir=tmp_path / "state") as cluster:
        process = start(cluster, 0, 1, *flags)
        until = time.monotonic() + 60
        while not (log.exists() and len(log.read_text().splitlines()) >= 3):
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.05)
        os.kill(cluster.pid(0), signal.SIGSTOP)
        try:
            process.send_signal(signal.SIGTERM)
            # One that comes at once is the same keystroke.
            time.sleep(2.5)
            assert process.poll() is None, "it waits for its step"
            process.send_signal(signal.SIGTERM)
            said = process.communicate(timeout=40)[0]
        finally:
            os.kill(cluster.pid(0), signal.SIGCONT)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "interrupted at once; what the last commit has is safe" in said
