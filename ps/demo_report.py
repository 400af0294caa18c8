"""What the demo shows at its end: a table, the loss as a picture, and both as JSON."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import grpc

from protos import zero_ps_pb2 as pb
from protos import zero_ps_pb2_grpc as rpc
from ps.demo_folder import DemoError, Paths


def server_status(address: str) -> pb.StatusResponse:
    """What a server says of itself. Raises DemoError when it does not answer."""
    try:
        with grpc.insecure_channel(address) as channel:
            return rpc.ParameterServerStub(channel).Status(pb.StatusRequest(), timeout=10, wait_for_ready=True)
    except grpc.RpcError:
        raise DemoError(f"server {address} does not answer any more; what was committed is safe") from None


def conclude(paths: Paths, server_peaks: Mapping[str, int], data_dirs: Iterable[Path | str]) -> None:
    """Writes summary.json and loss.png and prints the table.

    First loss and steps are the job's since it began; bytes and memory are those of this run. Raises
    DemoError when the trainers ended well but left no summary, as after `-- --help`.
    """
    if not paths.trainer_summary.exists():
        raise DemoError("the trainers ended without training; look at the flags after --", status=2)
    run: dict[str, Any] = json.loads(paths.trainer_summary.read_text())
    steps = [json.loads(line) for line in paths.log.read_text().splitlines()]
    summary = {
        "first_loss": steps[0]["loss"],
        "last_loss": run["last_loss"],
        "steps": run["steps"],
        "bytes_pulled": run["bytes_pulled"],
        "bytes_pushed": run["bytes_pushed"],
        "peak_rss_bytes": {**server_peaks, **run["peak_rss_bytes"]},
        "data_dirs": [str(folder) for folder in data_dirs],
    }
    paths.summary.write_text(json.dumps(summary, indent=2) + "\n")
    made = run["steps"] - run["first_step"]
    rows = [
        ("parameters", f"{run['parameters'] / 1e6:.1f} M, computed in {run['dtype']}"),
        ("first loss", f"{summary['first_loss']:.3f} nats per byte"),
        ("last loss", f"{summary['last_loss']:.3f} (mean of the last ten steps)"),
        ("steps", f"{summary['steps']}, of which {made} now, {run['seconds'] / max(made, 1):.2f} s each"),
        ("bytes pulled", f"{summary['bytes_pulled'] / 1e9:.2f} GB now, by all trainers"),
        ("bytes pushed", f"{summary['bytes_pushed'] / 1e9:.2f} GB now, by all trainers"),
        *((f"peak memory, {name}", f"{peak / 2**20:.0f} MiB") for name, peak in summary["peak_rss_bytes"].items()),
        *((f"store of server-{shard}", folder) for shard, folder in enumerate(summary["data_dirs"])),
        ("loss curve", _draw(paths, [(step["step"], step["loss"]) for step in steps])),
        ("summary", str(paths.summary)),
    ]
    width = max(len(name) for name, _ in rows)
    print()
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _draw(paths: Paths, curve: list[tuple[int, float]]) -> str:
    """Draws the loss curve; where it is, or what is missing to draw it."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return "not drawn: pip install 'zero-ps[bench]' brings matplotlib"
    # Neither pyplot nor a display: the figure is drawn straight to a file.
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([step for step, _ in curve], [loss for _, loss in curve], linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title="zero-ps demo")
    axes.grid(alpha=0.3)
    figure.savefig(paths.plot, dpi=120)
    return str(paths.plot)
