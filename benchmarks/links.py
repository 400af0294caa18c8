"""How fast links move bytes, and what that costs, each against the bare building block in the same run.

One trainer, servers on the same machine. Parameters are of 16 MiB in fp32 and travel as they are stored. *Pull*
asks for them as the coordinator does, 16 MiB at a time of each server, into memory that is used again; it is
compared with copying the same memory once (`shm`), with a gloo process group that sends and receives parcels of
the same size (`gloo`), or with a gRPC stream of messages of the same size whose receiver drops them (`grpc`). That one
sends the same message, which is in the cache, again and again; so there is another one that cuts its messages from
memory of the same size and copies them to where they end, as whoever has something to send must.
*Push* sends a gradient for every parameter and waits until servers have counted them; for `shm` with the copy of
the gradient to where it leaves from, which a trainer makes with every link. Sides take turns; medians.
"""

import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

import trainer
from benchmarks import report
from benchmarks.bare_pair import BarePair, bare_pair
from benchmarks.bare_stream import BareStream, bare_stream
from benchmarks.processes import processor_seconds
from protos import zero_ps_pb2 as pb
from ps import LocalCluster
from trainer.job import Job
from trainer.links import PushKind
from trainer.memory import MemoryPool
from trainer.offload import find
from trainer.optimizer import RemoteOptimizer
from trainer.parameter import OffloadedParameter
from trainer.transfer import Arrival, Destination

_SIDE = 2048
_NBYTES = _SIDE * _SIDE * 4
_WINDOW = 2
"""Parameters on their way for each server."""


def run(quick: bool) -> list[report.Row]:
    torch.set_num_threads(1)
    count, rounds = (8, 5) if quick else (16, 15)
    rows = [report.Row("load of the machine before", os.getloadavg()[0], "processes that want to run")]
    with bare_stream() as stream, bare_pair() as pair:
        rows += _one_server("shm", None, count, rounds)
        rows += _one_server("gloo", pair, count, rounds)
        with bare_stream((_WINDOW * _NBYTES, count * _NBYTES)) as copying:
            rows += _one_server("grpc", stream, count, rounds, copying)
    for servers in (2,) if quick else (1, 2, 4):
        for kind in ("shm", "gloo", "grpc"):
            rows.append(aggregate(kind, servers, count, rounds))
    return rows


class Side:
    """Something that moves `nbytes`; seconds of the clock, and processor seconds of both processes, each time."""

    def __init__(self, nbytes: int, server_pids: Sequence[int], move: Callable[[], float | None]) -> None:
        self.seconds: list[float] = []
        self._nbytes = nbytes
        self._pids = server_pids
        self._move = move
        self._cpu: list[tuple[float, float]] = []

    def go(self) -> None:
        before = time.process_time(), sum(map(processor_seconds, self._pids))
        begin = time.perf_counter()
        seconds = self._move()
        self.seconds.append(time.perf_counter() - begin if seconds is None else seconds)
        after = time.process_time(), sum(map(processor_seconds, self._pids))
        self._cpu.append((after[0] - before[0], after[1] - before[1]))

    def forget_first(self) -> None:
        """The first time gets memory for everything."""
        del self.seconds[0]
        del self._cpu[0]

    @property
    def rate(self) -> float:
        """GB/s."""
        return self._nbytes / statistics.median(self.seconds) / 1e9

    def cpu(self, server: bool) -> float:
        """Processor seconds for each GB, of the servers or of this process."""
        return statistics.fmean(seconds[server] for seconds in self._cpu) / (self._nbytes / 1e9)


@dataclass(frozen=True)
class Move:
    """One direction of a link, and the building block that it is compared with. bar: for the ratio of their rates."""

    name: str
    side: Side
    block: Side
    against: str
    bar: float | None = None


def in_turns(
    moves: Sequence[Move], case: report.Case, rounds: int, after_round: Callable[[], None]
) -> list[report.Row]:
    """The rows of sides that take turns, and one round more, which does not count."""
    sides = list(dict.fromkeys([*(move.side for move in moves), *(move.block for move in moves)]))
    for _ in range(1 + rounds):
        for side in sides:
            side.go()
        after_round()
    for side in sides:
        side.forget_first()
    rows = []
    for move in moves:
        name, block = move.name, move.block
        rate, ratio = move.side.rate, move.side.rate / block.rate
        rows += [
            report.Row(name, rate, "GB/s", move.against, ratio, at_least=move.bar, case=case),
            report.Row(f"{name}: {move.against}", block.rate, "GB/s", case=case),
            *_processor_time(f"{name}: {move.against}", block, case),
        ]
    for name, side in {move.name: move.side for move in moves}.items():
        rows += _processor_time(name, side, case)
    return rows


def _processor_time(name: str, side: Side, case: report.Case) -> list[report.Row]:
    return [
        report.Row(f"{name}: processor time of the trainer", side.cpu(False), "s/GB", case=case),
        report.Row(f"{name}: processor time of the server", side.cpu(True), "s/GB", case=case),
    ]


def _one_server(
    kind: str, bare: BareStream | BarePair | None, count: int, rounds: int, copying: BareStream | None = None
) -> list[report.Row]:
    """copying: a second stream that the link is compared with."""
    with LocalCluster(servers=1) as cluster, _Parameters(cluster, kind, count) as parameters:
        nbytes, pids = count * _NBYTES, [cluster.pid(0)]
        pull, push = Side(nbytes, pids, parameters.pull), Side(nbytes, pids, parameters.push)
        bars: tuple[float, float | None]
        if bare is None:
            bars, against = (0.6, None), "memcpy"
            blocks = [Side(nbytes, [], parameters.copy)] * 2
        else:
            bars, against = (0.85, 0.85), "bare gRPC stream" if kind == "grpc" else "bare ProcessGroupGloo"
            blocks = [
                Side(nbytes, [bare.pid], lambda: bare.pull(nbytes)),
                Side(nbytes, [bare.pid], lambda: bare.push(nbytes)),
            ]
        moves = [Move("pull", pull, blocks[0], against, bars[0]), Move("push", push, blocks[1], against, bars[1])]
        if copying is not None:
            against = "bare gRPC stream from and into memory"
            blocks = [
                Side(nbytes, [copying.pid], lambda: copying.pull(nbytes)),
                Side(nbytes, [copying.pid], lambda: copying.push(nbytes)),
            ]
            moves += [Move("pull", pull, blocks[0], against), Move("push", push, blocks[1], against)]
        return in_turns(moves, {"link": kind}, rounds, parameters.zero)


def aggregate(kind: str, servers: int, count: int, rounds: int) -> report.Row:
    """Pulls of `count` parameters from so many servers."""
    with LocalCluster(servers=servers) as cluster, _Parameters(cluster, kind, count) as parameters:
        side = Side(count * _NBYTES, [], parameters.pull)
        for _ in range(rounds):
            side.go()
    return report.Row("pull from all servers", side.rate, "GB/s", case={"link": kind, "servers": servers})


class _Parameters:
    """A job of `count` parameters over one kind of link. A context manager."""

    def __init__(self, cluster: LocalCluster, kind: str, count: int) -> None:
        self.job: Job = trainer.connect(cluster.addresses, job="bytes", links=[kind])
        model = nn.ParameterList(nn.Parameter(torch.ones(_SIDE, _SIDE)) for _ in range(count))
        trainer.offload(model, self.job)
        RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        self.model = model
        found = find(model)
        assert found is not None
        self.states: list[OffloadedParameter] = list(found.states)
        self.window = _WINDOW * len(cluster.addresses)
        self.targets = [_memory() for _ in range(self.window)]
        self.source = _memory()
        self.pool = self.job.outbox or MemoryPool()

    def __enter__(self) -> "_Parameters":
        return self

    def __exit__(self, *error: object) -> None:
        self.job.close()

    def pull(self) -> None:
        under_way: deque[Arrival] = deque()
        for number, state in enumerate(self.states):
            if len(under_way) == self.window:
                under_way.popleft().wait()
            assert state.remote is not None
            destination = Destination(state.remote, self.targets[number % self.window], torch.float32)
            under_way.append(self.job.transfer.pull([destination], self.job.step))
        for arrival in under_way:
            arrival.wait()

    def push(self) -> None:
        transfer = self.job.transfer
        for state in self.states:
            transfer.reserve(_NBYTES, 32 << 20)
            gradient = self.source
            if self.job.outbox is not None:
                block = self.pool.take(_NBYTES)
                gradient = torch.empty(0, dtype=torch.uint8).set_(block).copy_(gradient)
            assert state.remote is not None
            values = gradient.view(torch.float32).view(state.shape)
            transfer.push(state.remote, values, PushKind.GRADIENT, step=self.job.step)
        transfer.flush()

    def zero(self) -> None:
        """Has servers forget the gradients, so that the next ones are the first again."""
        for server in self.job.servers:
            server.call("ZeroGrad", pb.ZeroGradRequest(session_id=server.session_id, step=self.job.step), 60)

    def copy(self) -> None:
        for number in range(len(self.states)):
            self.targets[number % self.window].copy_(self.source)


def _memory() -> torch.Tensor:
    """16 MiB as parameters have them, with pages."""
    block = MemoryPool().take(_NBYTES)
    return torch.empty(0, dtype=torch.uint8).set_(block).fill_(1)


if __name__ == "__main__":
    sys.exit(report.main(__doc__, run))
