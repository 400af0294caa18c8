"""What commits cost while training goes on: step time with one every 20 steps against none.

    python -m benchmarks.commit

One server, one trainer, a model of equal linear layers under AdamW, all of it in memory; then again with a limit
that less than a half of it fits into. Both ways in turn, in blocks of 20 steps, so that whatever else the machine
does meets both; the median of the blocks counts. The batch is so large that a step computes for a while, as
training does.
"""

import statistics
import sys
import tempfile
import time

import torch
from torch import nn

import trainer
from benchmarks import report
from ps import LocalCluster

STEPS = 20


def run(quick: bool) -> list[report.Row]:
    """The rows of the medians of blocks."""
    sizes = (4, 1024, 256, 3) if quick else (6, 2048, 128, 4)
    return [measured(*sizes), measured(*sizes, memory="40MiB" if quick else "160MiB")]


def measured(layers: int, width: int, rows: int, blocks: int, memory: str | None = None) -> report.Row:
    """memory: the server's limit. There is a bar for what fits."""
    with (
        tempfile.TemporaryDirectory(prefix="zero-ps-") as folder,
        LocalCluster(1, data_dir=folder, memory=memory) as cluster,
        trainer.connect(cluster.addresses, job="commit") as job,
    ):
        with job.init():
            model = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])
        trainer.offload(model, job)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-4)
        inputs = torch.randn(rows, width)
        _block(model, optimizer, inputs)
        job.commit()
        committing, plain = [], []
        for _ in range(blocks):
            plain.append(_block(model, optimizer, inputs))
            began = time.perf_counter()
            commit = job.commit(wait=False)
            announcing = time.perf_counter() - began
            committing.append(announcing / STEPS + _block(model, optimizer, inputs))
            # What is left of it is no cost of the steps that follow, which are without.
            commit.wait()
        shard_bytes = 4 * sum(param.numel() * 4 for param in model.parameters())
    return report.Row(
        "step with a commit every 20 steps",
        statistics.median(committing) * 1e3,
        "ms",
        against="the same steps without",
        ratio=statistics.median(committing) / statistics.median(plain),
        at_most=1.1 if memory is None else None,
        case={
            "shard and gradients MB": shard_bytes // 1_000_000,
            "memory": memory or "all",
            "step ms": round(statistics.median(plain) * 1e3),
        },
    )


def _block(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor) -> float:
    """Seconds for one step, over `STEPS` steps."""
    began = time.perf_counter()
    for _ in range(STEPS):
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return (time.perf_counter() - began) / STEPS


if __name__ == "__main__":
    sys.exit(report.main(__doc__, run))
