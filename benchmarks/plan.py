"""How far off `zero-ps plan` is: steps as planned for this machine against steps that were measured on it.

    python -m benchmarks.plan

First what the machine does: its disk by itself, links, AdamW on one core, and forward and backward of plain torch
for each model and batch, which is what `--flops` asks for. Then a few configurations as planned from that and from
the model's size, over the same as measured: step time, processor seconds of all processes, bytes that trainers pull
and push, and bytes that servers read from and write to their disk. The ratio is planned over measured.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import report, step
from benchmarks.links import aggregate
from benchmarks.processes import disk_bytes
from benchmarks.scale import SIZES
from benchmarks.sides.process import Ranks, SideError
from benchmarks.storage import WIDTH, raw_io, timed
from benchmarks.workload import Workload
from ps.tools.capacity import Cluster, Estimate, estimate
from ps.tools.hf_config import ModelSize

WARM_UP = 3
STEPS = 6
SERVERS = 2
CORES = 2.0
"""What trainers and servers share."""

_FILE_BYTES = WIDTH * WIDTH * 4


@dataclass(frozen=True)
class Config:
    """model: of `benchmarks.scale.SIZES`. tier: a variant of `benchmarks.step`."""

    model: str
    tier: str
    batch: int
    length: int

    @property
    def work(self) -> Workload:
        shape = SIZES[self.model]
        return Workload(self.batch, self.length, shape.layers, shape.width, shape.heads, threads=step.THREADS)


CONFIGS = (
    Config("35 M", "memory", 1, 64),
    Config("35 M", "disk", 1, 64),
    Config("151 M", "memory", 1, 64),
    Config("151 M", "memory", 4, 256),
    Config("151 M", "disk", 1, 64),
    Config("151 M", "disk", 4, 256),
    Config("403 M", "memory", 1, 64),
    Config("403 M", "disk", 1, 64),
)

QUICK = (Config("35 M", "memory", 1, 64), Config("35 M", "disk", 1, 64))


def run(quick: bool) -> list[report.Row]:
    """The rows of what this machine does, and of each configuration as planned against what was measured."""
    machine = _machine(quick)
    rows = [
        report.Row("disk, read", machine.disk_read / 1e9, "GB/s"),
        report.Row("disk, written", machine.disk_write / 1e9, "GB/s"),
        report.Row("pulled over shm", machine.link / 1e9, "GB/s"),
        report.Row("AdamW", machine.updates_per_core / 1e9, "G parameters/s and core"),
    ]
    flops: dict[Workload, float] = {}
    errors = []
    for config in QUICK if quick else CONFIGS:
        try:
            if config.work not in flops:
                flops[config.work] = _flops(config.work)
                case: report.Case = {"model": config.model, "batch": _batch(config)}
                rows.append(report.Row("plain torch computes", flops[config.work] / 1e9, "GFLOP/s", case=case))
            measured = _measured(config)
        except SideError as error:
            print(f"left out: {error}", file=sys.stderr, flush=True)
            continue
        found = _rows(config, _planned(config, machine, flops[config.work]), measured)
        errors.append(max(found[0].ratio or 1.0, 1 / (found[0].ratio or 1.0)))
        rows += found
    if not errors:
        return rows
    rows.append(report.Row("off, in the median", statistics.median(errors), "times", case={"of": "step time"}))
    rows.append(report.Row("off, at most", max(errors), "times", case={"of": "step time"}))
    return rows


# ---------------------------------------------------------------- what the machine does


@dataclass(frozen=True)
class Machine:
    """Bytes and parameters in a second."""

    disk_read: float
    disk_write: float
    link: float
    updates_per_core: float


def _machine(quick: bool) -> Machine:
    read, written = _disk(64 if quick else 256)
    return Machine(read, written, aggregate("shm", SERVERS, 8, 5).value * 1e9, _updates())


def _disk(files: int) -> tuple[float, float]:
    """Medians of three, in turn, where servers would have their folders."""
    with tempfile.TemporaryDirectory(prefix="zero-ps-disk-") as folder:
        paths = [Path(folder) / str(number) for number in range(files)]
        # What is there already is written faster, as servers do.
        raw_io([], paths)
        times = [(timed(lambda: raw_io(paths, [])), timed(lambda: raw_io([], paths))) for _ in range(3)]
    size = files * _FILE_BYTES
    return size / statistics.median(read for read, _ in times), size / statistics.median(wrote for _, wrote in times)


def _updates() -> float:
    """Processor seconds are those on the clock of a core that does nothing else."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    weight = torch.zeros(8 << 20)
    weight.grad = torch.full_like(weight, 0.01)
    optimizer = torch.optim.AdamW([weight], lr=1e-3, fused=True)
    seconds = []
    for _ in range(6):
        began = time.process_time()
        optimizer.step()
        seconds.append(time.process_time() - began)
    torch.set_num_threads(threads)
    return weight.numel() / statistics.median(seconds[1:])


def _flops(work: Workload) -> float:
    """Of plain torch's forward and backward on all cores, in a second; of the fastest step. That is of seconds in
    which its thread ran, not waiting for the others' part, so that it counts for nothing what else the machine does."""
    environment = {"OMP_WAIT_POLICY": "passive"}
    with Ranks(step.PLAIN, sys.executable, "benchmarks.sides.plain", work, environment=environment) as side:
        side.wait_ready()
        side.block(WARM_UP)
        steps = [side.block(1).spent[0] for _ in range(STEPS)]
    running = min(spent["forward running"] + spent["backward running"] for spent in steps)
    # Where the kernel does not count, it is the clock.
    return 6 * work.parameters * _tokens(work) / (running or min(s["forward"] + s["backward"] for s in steps))


# ---------------------------------------------------------------- planned and measured


def _planned(config: Config, machine: Machine, flops: float) -> Estimate:
    parameters = config.work.parameters
    share = step.VARIANTS[config.tier].memory_share
    cluster = Cluster(
        servers=SERVERS,
        server_memory=float("inf") if share is None else config.work.memory_limit(share, SERVERS),
        server_cores=int(CORES),
        server_network=machine.link,
        # They share one disk.
        disk_read=machine.disk_read / SERVERS,
        disk_write=machine.disk_write / SERVERS,
        hosts=1,
        trainers=1,
        host_network=machine.link,
        interconnect=float("inf"),
        flops=flops,
        live=float("inf"),
        link="shm",
        group=False,
        updates_per_core=machine.updates_per_core,
        one_machine=CORES,
    )
    with torch.device("meta"):
        tensors = len(list(config.work.model().parameters()))
    return estimate(ModelSize(parameters, parameters, 0, tensors), _tokens(config.work), cluster)


@dataclass(frozen=True)
class Measured:
    """Of one step. Bytes of all trainers, and of all servers' disks."""

    seconds: float
    processor: float
    pulled: float
    pushed: float
    disk_read: float
    disk_written: float


def _measured(config: Config) -> Measured:
    with step.started(config.tier, config.work) as side:
        side.wait_ready()
        side.block(WARM_UP)
        servers = [pid for name, pid in side.pids().items() if name.startswith("server")]
        before = [disk_bytes(pid) for pid in servers]
        block = side.block(STEPS)
        after = [disk_bytes(pid) for pid in servers]
    read = sum(one.read - other.read for one, other in zip(after, before, strict=True))
    written = sum(one.written - other.written for one, other in zip(after, before, strict=True))
    return Measured(
        statistics.median(block.seconds),
        block.processor_seconds / STEPS,
        block.moved["pulled"] / STEPS,
        block.moved["pushed"] / STEPS,
        read / STEPS,
        written / STEPS,
    )


def _rows(config: Config, planned: Estimate, measured: Measured) -> Sequence[report.Row]:
    """The step's first."""
    bottleneck = planned.bottleneck.resource
    case: report.Case = {
        "model": config.model,
        "tier": config.tier,
        "batch": _batch(config),
        "bottleneck": bottleneck,
    }
    processors = next(demand.amount for demand in planned.demands if demand.resource == "processors of the machine")
    pairs = [
        ("step", "s", planned.seconds, measured.seconds),
        ("processor time", "s a step", processors, measured.processor),
        ("pulled", "MB a step", planned.pulled / 1e6, measured.pulled / 1e6),
        ("pushed", "MB a step", planned.pushed / 1e6, measured.pushed / 1e6),
        ("disk read", "MB a step", SERVERS * planned.disk_read / 1e6, measured.disk_read / 1e6),
        ("disk written", "MB a step", SERVERS * planned.disk_written / 1e6, measured.disk_written / 1e6),
    ]
    return [
        report.Row(f"planned {name}", value, unit, "measured", value / found if found else None, case=case)
        for name, unit, value, found in pairs
        if value
    ]


def _batch(config: Config) -> str:
    return f"{config.batch} × {config.length}"


def _tokens(work: Workload) -> int:
    return work.batch * work.length


if __name__ == "__main__":
    sys.exit(report.main(__doc__, run))
