"""A training script in group mode that torchrun starts, one of whose processes ends the first time.

torchrun --nproc-per-node 2 --max-restarts 3 -m tests.trainer.recovery.restarted ADDRESSES JOB FOLDER
"""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import trainer
from tests.models import Residual, loss_of, seeded
from tests.trainer.recovery.programs import adamw, share
from tests.trainer.runs import gathered_values

STEPS, COMMITTED, FAILS_AT = 6, 2, 4


def main() -> None:
    addresses, name, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    torch.set_num_threads(1)
    # Forming it anew fails at times; torchrun then starts both once more.
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    rank = dist.get_rank()
    with trainer.connect(addresses, job=name, connect_timeout=60, timeout=60) as job:
        model = seeded(Residual)
        trainer.offload(model, job, trainer.OffloadConfig(mode="group"))
        optimizer = adamw(model)
        began = job.step
        while job.step < STEPS:
            loss_of(model, share(job.step, rank, 2)).backward()
            if first and job.step == FAILS_AT and rank == 1:
                _fail(folder)
            optimizer.step()
            optimizer.zero_grad()
            if job.step == COMMITTED:
                job.commit()
        values = gathered_values(model)
        if rank == 0:
            torch.save({"began": began, "params": values}, folder / "result.pt")
        job.barrier("the end")


def _fail(folder: Path) -> None:
    """Ends this process when the test has done what it wants to."""
    (folder / "failing").touch()
    end = time.monotonic() + 60
    while not (folder / "go").exists() and time.monotonic() < end:
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
