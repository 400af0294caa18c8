"""Group mode: torchrun starts all trainers again when one is lost, and they go on from the servers."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ps import LocalCluster
from tests.trainer.recovery.programs import Plain
from tests.trainer.recovery.restarted import COMMITTED, FAILS_AT, STEPS

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(("lost", "began"), [("a trainer", FAILS_AT), ("a trainer and a server", COMMITTED)])
def test_trainers_that_are_started_again_go_on_from_memory_or_from_the_commit(
    lost: str, began: int, tmp_path: Path
) -> None:
    with LocalCluster(2, links=["grpc"], lease=5.0, data_dir=tmp_path / "state") as cluster:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "3"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--monitor-interval", "0.1"),
            *("-m", "tests.trainer.recovery.restarted", ",".join(cluster.addresses), "restarted", str(tmp_path)),
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        run = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            end = time.monotonic() + 60
            while not (tmp_path / "failing").exists():
                assert run.poll() is None and time.monotonic() < end, run.communicate(timeout=10)[0]
                time.sleep(0.05)
            if "server" in lost:
                cluster.restart(0)
            (tmp_path / "go").touch()
            output, _ = run.communicate(timeout=100)
        finally:
            if run.poll() is None:
                # Ends what it has started.
                run.terminate()
                run.wait(60)
    assert run.returncode == 0, output
    result = torch.load(tmp_path / "result.pt")
    assert result["began"] == began
    Plain(lambda step: 2).train_to(STEPS).check(result["params"])
