"""How long a step takes on each resource of a cluster, from what has to move and what was measured of zero-ps."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ps.tools.hf_config import ModelSize

# Measured with `python -m benchmarks.links` and `benchmarks.optimizer`; docs/performance.md.
SERVER_SECONDS_PER_GB: Mapping[str, tuple[float, float]] = {
    "shm": (0.05, 0.20),
    "gloo": (0.45, 0.67),
    "grpc": (0.71, 0.93),
}
"""Processor seconds of a server for each GB, pulled and pushed, by link."""

MEASURED_RATE: Mapping[str, float] = {"shm": 4.8e9, "gloo": 1.9e9, "grpc": 1.2e9}
"""Bytes in a second that servers have been seen to send, by link, where trainers and servers shared two cores."""

TRAINER_SECONDS_PER_GB: Mapping[str, tuple[float, float]] = {
    "shm": (0.24, 0.20),
    "gloo": (0.36, 0.34),
    "grpc": (0.81, 0.74),
}
"""Processor seconds of a trainer, in the same way."""

UPDATES_PER_CORE = 0.7e9
"""Parameters that one core takes through AdamW in a second."""

CONVERSIONS_PER_CORE = 0.8e9
"""Parameters whose gradient one core widens from 16 bits, and whose copy in 16 bits it makes, in a second."""

CHUNK_SECONDS = 1e-3, 1.5e-3
"""Of Python, of a server and of a trainer, for each chunk: to pull it, push its gradient and update it once."""

CHUNK_PARAMETERS = 2e6
"""Of a chunk that is none of a small tensor."""

DISK_SECONDS_PER_GB = 0.35
"""Processor seconds of a server for each GB from or to its disk."""

WORKING_BYTES = 512 << 20
"""Of a server whose memory is limited, at most: for what is on its way, being worked on or read ahead, and half of its
memory if that is less. The rest keeps parts from one step to the next."""

STATE_BYTES = 12
"""Of a trained parameter under AdamW with fp32 masters: weight and two moments."""

COPY_BYTES = 2
"""Of the copy in compute dtype that pulls are answered from, of a gradient on the wire, and of a parameter there."""

GRADIENT_BYTES = 4
"""Of the accumulator of one trainer's gradient."""

_FLOPS = 6
"""Operations for each parameter and token, forward and backward."""


@dataclass(frozen=True)
class Cluster:
    """Rates are bytes in a second, memory is bytes; `servers` and `hosts` each have all that is stated for one.

    servers: storage hosts, one server each. hosts: compute hosts. trainers: in all, spread over the hosts.
    disk_read, disk_write: each when it is all that the disks do; doing both they have to share the time.
    interconnect: between trainers, for each of them, both ways together. flops: of one trainer, as reached.
    live: of parameters, what a trainer may hold.
    updates_per_core: parameters in a second, under AdamW.
    one_machine: cores that all servers and trainers share, each trainer computing on its part of them; 0 where they
        are on hosts of their own.
    """

    servers: int
    server_memory: float
    server_cores: int
    server_network: float
    disk_read: float
    disk_write: float
    hosts: int
    trainers: int
    host_network: float
    interconnect: float
    flops: float
    live: float
    link: str = "gloo"
    group: bool = True
    updates_per_core: float = UPDATES_PER_CORE
    one_machine: float = 0.0


@dataclass(frozen=True)
class Demand:
    """One resource in one step. amount / rate is how long it takes by itself.

    where: "trainers", "servers" or "between": which of them more of would help.
    """

    resource: str
    where: str
    amount: float
    rate: float
    unit: str

    @property
    def seconds(self) -> float:
        return self.amount / self.rate if self.amount else 0.0


@dataclass(frozen=True)
class Estimate:
    """Of one step. on_disk: the share of the state that does not fit into the servers' memory.

    pulled, pushed: bytes of all trainers together. disk_read, disk_written: bytes of one server.

    The step takes as long as the slowest resource, if everything else is hidden behind it.
    """

    demands: tuple[Demand, ...]
    on_disk: float
    server_bytes: float
    pulled: float
    pushed: float
    disk_read: float
    disk_written: float
    notes: tuple[str, ...] = field(default=())

    @property
    def seconds(self) -> float:
        return self.bottleneck.seconds

    @property
    def bottleneck(self) -> Demand:
        return max(self.demands, key=lambda demand: demand.seconds)


def estimate(model: ModelSize, tokens: int, cluster: Cluster) -> Estimate:
    """What one optimizer step over `tokens`, of all trainers together, takes."""
    whole = float(model.parameters * COPY_BYTES)
    # What a trainer still holds when the backward begins is not pulled again.
    pulls = 2 - min(1.0, cluster.live / whole)
    copies = 1 if cluster.group else cluster.trainers
    pulled, pushed = copies * pulls * whole, copies * whole
    per_server = model.parameters / cluster.servers
    pull_seconds, push_seconds = SERVER_SECONDS_PER_GB[cluster.link]
    chunks = max(model.tensors, model.parameters / CHUNK_PARAMETERS)
    # A third each for a pull, a push and an update.
    python = chunks / cluster.servers * CHUNK_SECONDS[0] * (2 * copies + 1) / 3
    processor = per_server * (1 / cluster.updates_per_core + 1 / CONVERSIONS_PER_CORE) + python
    processor += (pulled * pull_seconds + pushed * push_seconds) / 1e9 / cluster.servers

    gradients = GRADIENT_BYTES * (1 if cluster.group else cluster.trainers)
    server_bytes = per_server * (STATE_BYTES + COPY_BYTES + gradients)
    memory = cluster.server_memory
    held = memory if memory >= server_bytes else memory - min(memory / 2, WORKING_BYTES)
    on_disk = max(0.0, 1 - held / server_bytes)
    # Every update reads and writes all state, and the copy that pulls are answered from. A pull reads that once,
    # whoever else asks for it soon after. Gradients wait there for the update, in the 16 bits that they came in.
    waiting = COPY_BYTES * (1 if cluster.group else cluster.trainers)
    read = per_server * on_disk * (STATE_BYTES + COPY_BYTES * pulls + waiting)
    written = per_server * on_disk * (STATE_BYTES + COPY_BYTES + waiting)
    disk_seconds = read / cluster.disk_read + written / cluster.disk_write
    processor += (read + written) / 1e9 * DISK_SECONDS_PER_GB

    demands = [
        Demand(
            "compute of a trainer", "trainers", _FLOPS * model.active * tokens / cluster.trainers, cluster.flops, "FLOP"
        ),
        Demand("network of a compute host, in", "trainers", pulled / cluster.hosts, cluster.host_network, "B"),
        Demand("network of a compute host, out", "trainers", pushed / cluster.hosts, cluster.host_network, "B"),
        Demand("network of a server, out", "servers", pulled / cluster.servers, cluster.server_network, "B"),
        Demand("network of a server, in", "servers", pushed / cluster.servers, cluster.server_network, "B"),
        Demand("processor of a server", "servers", processor, float(cluster.server_cores), "core s"),
        # One thread at a time runs Python.
        Demand("Python of a server", "servers", python, 1.0, "core s"),
        # At the rate of the mix.
        Demand("disk of a server", "servers", read + written, (read + written) / (disk_seconds or 1.0), "B"),
    ]
    if cluster.one_machine:
        trainers = _FLOPS * model.active * tokens / cluster.flops * cluster.one_machine / cluster.trainers
        pull_seconds, push_seconds = TRAINER_SECONDS_PER_GB[cluster.link]
        trainers += (pulled * pull_seconds + pushed * push_seconds) / 1e9
        trainers += chunks * copies * CHUNK_SECONDS[1]
        everything = trainers + processor * cluster.servers
        demands.append(Demand("processors of the machine", "between", everything, cluster.one_machine, "core s"))
    if cluster.group and cluster.trainers > 1:
        # All-gathers bring each trainer what the others pulled; gradients go the other way, once.
        others = (cluster.trainers - 1) / cluster.trainers
        moved = others * (pulls + 1) * whole
        demands.append(Demand("between trainers", "between", moved, cluster.interconnect, "B"))
    return Estimate(tuple(demands), on_disk, server_bytes, pulled, pushed, read, written, _notes(model, cluster))


def servers_needed(model: ModelSize, tokens: int, cluster: Cluster, most: int = 4096) -> int | None:
    """The fewest servers with which no server is the bottleneck; None if `most` are too few."""
    for servers in range(1, most + 1):
        found = estimate(model, tokens, replace(cluster, servers=servers))
        others = max(demand.seconds for demand in found.demands if demand.where != "servers")
        if all(demand.seconds <= others for demand in found.demands if demand.where == "servers"):
            return servers
    return None


def _notes(model: ModelSize, cluster: Cluster) -> tuple[str, ...]:
    notes = []
    if math.ceil(model.largest_layer * COPY_BYTES * 2) > cluster.live:
        notes.append(
            f"the largest submodule has {model.largest_layer / 1e6:.0f} M parameters; to look ahead a trainer needs "
            "room for two of them (--live)"
        )
    measured = MEASURED_RATE[cluster.link]
    if cluster.server_network > measured:
        notes.append(
            f"nobody has measured a server that sends more than {measured / 1e9:.1f} GB/s over {cluster.link}, nor one "
            "with more than two cores"
        )
    if cluster.trainers % cluster.hosts:
        notes.append("trainers are not spread evenly over the hosts")
    return tuple(notes)
