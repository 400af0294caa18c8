"""How much memory a trainer needs for models of growing size.

For each size a fresh process builds a model under `Job.init()`, trains two steps and commits, with
`max_live_bytes` at twice the largest submodule. Its resident memory is compared with the model's bytes, and
the parameters that were live at once with that limit.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import trainer
from benchmarks import report
from benchmarks.processes import peak_bytes
from ps import LocalCluster

WIDTH = 2048
"""One layer has WIDTH x WIDTH elements in fp32: 16 MiB."""

LIMIT_LAYERS = 2
"""`max_live_bytes`, in layers."""

MIB = 1 << 20


class Deep(nn.Module):
    """Equal layers, each a small part of the model."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def run(quick: bool) -> list[report.Row]:
    """The rows of models of growing size, and of how the peak grows with it."""
    sizes = (8, 24) if quick else (8, 16, 32, 64)
    found = []
    for layers in sizes:
        with LocalCluster(servers=2) as cluster:
            found.append(_in_a_process(cluster.addresses, layers))
    rows = []
    for layers, figures in zip(sizes, found, strict=True):
        case: dict[str, str | int | float] = {"layers": layers, "model_mib": figures["model"] // MIB}
        beyond, limit = figures["beyond"], figures["limit"]
        rows += [
            report.Row("peak of a trainer", beyond / MIB, "MiB", "the model", beyond / figures["model"], case=case),
            *(
                report.Row(
                    name, figures[key] / MIB, "MiB", "max_live_bytes", figures[key] / limit, at_most=1, case=case
                )
                for name, key in (("parameters with memory", "live"), ("peak_live_bytes of the report", "reported"))
            ),
        ]
    growth = found[-1]["beyond"] - found[0]["beyond"]
    rows.append(
        report.Row(
            "growth of the peak",
            growth / MIB,
            "MiB",
            "the growth of the model",
            growth / (found[-1]["model"] - found[0]["model"]),
            at_most=1 / 8,
            case={"layers": f"{sizes[0]} to {sizes[-1]}"},
        )
    )
    return rows


def _in_a_process(addresses: list[str], layers: int) -> dict[str, int]:
    call = [sys.executable, "-m", __spec__.name, "--train", json.dumps([addresses, layers])]
    finished = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True)
    return {name: int(value) for name, value in json.loads(finished.stdout).items()}


def _train(addresses: list[str], layers: int) -> dict[str, int]:
    """Bytes: of the model, of the limit, of this process's peak beyond what it was before, and of the
    parameters that had memory at once: seen from within each layer's forward and backward, and as reported."""
    torch.set_num_threads(1)
    layer_bytes = WIDTH * WIDTH * 4
    limit = LIMIT_LAYERS * layer_bytes
    with trainer.connect(addresses, job="memory") as job:
        # What torch allocates once, for any model, is not the model's.
        nn.Linear(WIDTH, 8)(torch.randn(4, WIDTH)).sum().backward()
        before = peak_bytes(os.getpid())
        with job.init():
            model = Deep(layers)
        trainer.offload(model, job, trainer.OffloadConfig(max_live_bytes=limit))
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        # Until here nothing was read from the servers.
        own = [peak_bytes(os.getpid())]
        live: list[int] = []

        def look(*_: object) -> None:
            own.append(_own_bytes())
            live.append(sum(param.untyped_storage().nbytes() for param in model.parameters()))

        for layer in model.layers:
            layer.register_forward_pre_hook(look)
        for param in model.parameters():
            param.register_hook(look)  # type: ignore[no-untyped-call]
        for _ in range(2):
            model(torch.randn(4, WIDTH)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        job.commit()
        return {
            "model": layers * layer_bytes,
            "limit": limit,
            "beyond": max(own) - before,
            "live": max(live),
            "reported": trainer.report(model).peak_live_bytes,
        }


def _own_bytes() -> int:
    """Resident now, without what is shared, as memory that servers lend."""
    status = Path("/proc/self/status").read_text()
    return sum(int(size) * 1024 for size in re.findall(r"^Rss(?:Anon|File):\s+(\d+) kB$", status, re.MULTILINE))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        print(json.dumps(_train(*json.loads(sys.argv[2]))))
        sys.exit()
    sys.exit(report.main(__doc__, run))
