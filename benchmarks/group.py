"""Bytes that leave and reach the servers in a step, with one, two and four trainers, in both modes.

A model of 12 blocks, 50 M parameters, computed with in bf16; two servers, links over gRPC as between hosts. What
all trainers of a job pull and push is added up, in a step after the first two. In group mode it is the same
however many trainers there are.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn

import trainer
from benchmarks import report
from ps import LocalCluster

_STEPS = 3


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))  # type: ignore[no-any-return]


def run(quick: bool) -> list[report.Row]:
    """The rows of both modes, with one, two and four trainers; of a smaller model with one and two when quick."""
    width, blocks = (256, 4) if quick else (720, 12)
    rows: list[report.Row] = []
    # Twelve processes on two cores: one may be silent for a while.
    with LocalCluster(servers=2, lease=60.0) as cluster:
        for mode in ("group", "direct"):
            alone = (0, 0)
            for world_size in (1, 2) if quick else (1, 2, 4):
                moved = _moved(cluster.addresses, mode, world_size, width, blocks)
                alone = alone if any(alone) else moved
                for name, value, of_one in zip(("pulled", "pushed"), moved, alone, strict=True):
                    rows.append(
                        report.Row(
                            f"bytes {name} in a step",
                            value / 1e6,
                            "MB",
                            "one trainer",
                            value / of_one,
                            at_most=1.02 if mode == "group" and name == "pulled" else None,
                            case={"mode": mode, "trainers": world_size},
                        )
                    )
    return rows


def _moved(addresses: list[str], mode: str, world_size: int, width: int, blocks: int) -> tuple[int, int]:
    with tempfile.TemporaryDirectory() as folder:
        spawn(_train, (addresses, mode, world_size, width, blocks, folder), world_size)  # type: ignore[no-untyped-call]
        each = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world_size)]
    return sum(pulled for pulled, _ in each), sum(pushed for _, pushed in each)


def _train(rank: int, addresses: list[str], mode: str, world_size: int, width: int, blocks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    model = nn.Sequential(*[_Block(width) for _ in range(blocks)])
    name = f"{mode}-{world_size}"
    with trainer.connect(addresses, job=name, rank=rank, world_size=world_size, links=["grpc"]) as job:
        config = trainer.OffloadConfig(mode="group" if mode == "group" else "direct", param_dtype=torch.bfloat16)
        trainer.offload(model, job, config)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-3)
        for _ in range(_STEPS):
            before = job.stats.bytes_pulled, job.stats.bytes_pushed
            model(torch.randn(8, width, dtype=torch.bfloat16)).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        moved = job.stats.bytes_pulled - before[0], job.stats.bytes_pushed - before[1]
    Path(folder, f"{rank}.json").write_text(json.dumps(moved))
    # The others may still be at it.
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(report.main(__doc__, run))
