"""What links do with a GPU, each against the bare building block in the same run.

    python -m benchmarks.gpu --quick --json runs/bench/gpu.json

One trainer and one server on this machine, both on its first GPU: an NCCL_HOSTID each has NCCL take them for two
hosts. Parameters are of 16 MiB in fp32. *Pull* brings them to memory of the GPU as the coordinator does; it is compared
with a copy of the same bytes from pinned memory (`shm`), with a gRPC stream whose receiver drops what comes (`grpc`),
or with bare ncclSend and ncclRecv (`nccl`). *Push* sends a gradient from there for each. *Step* is one of a small GPT,
against plain torch on the same GPU. Sides take turns; medians. Without a GPU it says so and measures nothing.
"""

import functools
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

import trainer
from benchmarks import report
from benchmarks.bare_nccl import BareNccl, bare_nccl
from benchmarks.bare_stream import BareStream, bare_stream
from benchmarks.links import Move, Side, in_turns
from benchmarks.workload import Batches, Workload
from protos import nccl
from protos import zero_ps_pb2 as pb
from ps import LocalCluster
from trainer.device import point
from trainer.landing import Landing, PinnedPool, landing
from trainer.links import PushKind
from trainer.memory import MemoryPool
from trainer.offload import find
from trainer.optimizer import RemoteOptimizer
from trainer.parameter import OffloadedParameter
from trainer.transfer import Arrival, Destination

_SIDE = 2048
_NBYTES = _SIDE * _SIDE * 4
_WINDOW = 2
"""Parameters on their way at once."""

KINDS = ("shm", "nccl", "grpc")


def run(quick: bool) -> list[report.Row]:
    """Raises RuntimeError where there is no GPU."""
    if why := nccl.why_not():
        raise RuntimeError(why)
    count, rounds = (8, 5) if quick else (16, 15)
    rows = []
    with _host("zero-ps trainer"):
        with bare_stream() as stream, bare_nccl() as pair:
            rows += _moves("shm", None, count, rounds)
            rows += _moves("nccl", pair, count, rounds)
            rows += _moves("grpc", stream, count, rounds)
        rows += _pinned(rounds)
        rows += _steps(rounds)
    return rows


@contextmanager
def _host(name: str) -> Iterator[None]:
    """NCCL takes processes that it begins in for those of another host."""
    # A network of the machine's may not lead back to it.
    wanted = {"NCCL_HOSTID": name, "NCCL_SOCKET_IFNAME": "lo", "NCCL_NET": "Socket"}
    before = {key: os.environ.get(key) for key in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key)
            if value is not None:
                os.environ[key] = value


def _cluster() -> LocalCluster:
    with _host("zero-ps server"):
        return LocalCluster(servers=1, device="cuda:0")


def _moves(kind: str, bare: BareStream | BareNccl | None, count: int, rounds: int) -> list[report.Row]:
    nbytes = count * _NBYTES
    with _cluster() as cluster, _Parameters(cluster, kind, count) as parameters:
        pull = Side(nbytes, [cluster.pid(0)], parameters.pull)
        push = Side(nbytes, [cluster.pid(0)], parameters.push)
        if bare is None:
            against = ("copy from pinned memory", "copy to pinned memory")
            blocks = [Side(nbytes, [], parameters.copy_in), Side(nbytes, [], parameters.copy_out)]
        else:
            against = ("bare gRPC stream",) * 2 if kind == "grpc" else ("bare ncclRecv", "bare ncclSend")
            blocks = [
                Side(nbytes, [bare.pid], lambda: bare.pull(nbytes)),
                Side(nbytes, [bare.pid], lambda: bare.push(nbytes)),
            ]
        moves = (Move("pull", pull, blocks[0], against[0]), Move("push", push, blocks[1], against[1]))
        return in_turns(moves, {"link": kind, "memory": "cuda"}, rounds, parameters.zero)


@dataclass(frozen=True)
class _Memory:
    """A parameter's memory on the GPU, as far as a landing looks at it."""

    tensor: torch.Tensor
    nbytes: int = _NBYTES

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def bytes_view(self) -> torch.Tensor:
        return self.tensor


class _Parameters:
    """A job of `count` parameters over one kind of link, and memory on the GPU for some. A context manager."""

    def __init__(self, cluster: LocalCluster, kind: str, count: int) -> None:
        self._job = trainer.connect(cluster.addresses, job=f"bytes-{kind}", links=[kind])
        self._model = nn.ParameterList(nn.Parameter(torch.ones(_SIDE, _SIDE)) for _ in range(count))
        trainer.offload(self._model, self._job)
        RemoteOptimizer(self._model.parameters(), torch.optim.SGD, lr=0.1)
        found = find(self._model)
        assert found is not None
        self._states: list[OffloadedParameter] = list(found.states)
        device = torch.device("cuda:0")
        self._targets = [_Memory(torch.ones(_NBYTES, dtype=torch.uint8, device=device)) for _ in range(_WINDOW)]
        self._pinned = torch.ones(_NBYTES, dtype=torch.uint8, pin_memory=True)
        self._gradient = torch.ones(_SIDE, _SIDE, device=device)
        self._pool = self._job.outbox or MemoryPool()

    def __enter__(self) -> "_Parameters":
        return self

    def __exit__(self, *error: object) -> None:
        self._job.close()

    def pull(self) -> None:
        under_way: deque[tuple[Arrival, Landing]] = deque()
        for number, state in enumerate(self._states):
            if len(under_way) == _WINDOW:
                _land(*under_way.popleft())
            assert state.remote is not None
            place = landing(self._targets[number % _WINDOW], self._job.device)  # type: ignore[arg-type]
            destination = Destination(state.remote, place.buffer, torch.float32, None, place.after)
            under_way.append((self._job.transfer.pull([destination], self._job.step), place))
        for arrival, place in under_way:
            _land(arrival, place)
        torch.cuda.synchronize()

    def push(self) -> None:
        transfer = self._job.transfer
        for state in self._states:
            transfer.reserve(_NBYTES, 32 << 20)
            assert state.remote is not None
            after: tuple[torch.cuda.Event, ...] = ()
            sent: Callable[[], None] | None = None
            if self._job.device is not None:
                leaving = self._gradient.clone()
                after = (point(leaving.device),)
            else:
                block = self._pool.take(_NBYTES)
                sent = functools.partial(self._pool.give, block)
                leaving = torch.empty(0).set_(block).view(_SIDE, _SIDE).copy_(self._gradient)
            transfer.push(state.remote, leaving, PushKind.GRADIENT, step=self._job.step, after=after, on_sent=sent)
        transfer.flush()

    def zero(self) -> None:
        """Has the server forget the gradients, so that the next ones are the first again."""
        for server in self._job.servers:
            server.call("ZeroGrad", pb.ZeroGradRequest(session_id=server.session_id, step=self._job.step), 60)

    def copy_in(self) -> None:
        for number in range(len(self._states)):
            self._targets[number % _WINDOW].tensor.copy_(self._pinned, non_blocking=True)
        torch.cuda.synchronize()

    def copy_out(self) -> None:
        for number in range(len(self._states)):
            self._pinned.copy_(self._targets[number % _WINDOW].tensor, non_blocking=True)
        torch.cuda.synchronize()


def _land(arrival: Arrival, place: Landing) -> None:
    arrival.wait()
    place.arrived()
    place.use()
    place.close()


def _pinned(rounds: int) -> list[report.Row]:
    """Pinned memory for one parameter, from the pool and from CUDA."""
    pool = PinnedPool()
    pool.give(pool.take(_NBYTES), None)
    pooled = _median(rounds, lambda: pool.give(pool.take(_NBYTES), None))
    fresh: list[torch.Tensor] = []
    # Kept, so that torch's own pool cannot give the same again.
    pinned = _median(rounds, lambda: fresh.append(torch.empty(_NBYTES, dtype=torch.uint8, pin_memory=True)))
    return [report.Row("16 MiB of the pinned pool", pooled, "s", "pinned anew", pooled / pinned)]


def _steps(rounds: int) -> list[report.Row]:
    """A small GPT in fp32 under AdamW."""
    work = Workload(batch=2, length=128, layers=4, width=512, heads=8)
    batches = Batches(work)
    with _cluster() as cluster:
        sides: dict[str, tuple[nn.Module, torch.optim.Optimizer]] = {}
        plain: nn.Module = work.model().cuda()
        sides["plain torch"] = plain, torch.optim.AdamW(plain.parameters(), lr=1e-4, fused=True)
        jobs = {kind: trainer.connect(cluster.addresses, job=f"gpt-{kind}", links=[kind]) for kind in KINDS}
        for kind, job in jobs.items():
            config = trainer.OffloadConfig(max_reuse_distance=0)
            model = trainer.offload(work.model(), job, config, device="cuda")
            sides[kind] = model, RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-4)
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for step in range(3 + rounds):
            x, y = (each.cuda() for each in batches.at(step))
            for name, (model, optimizer) in sides.items():
                begin = time.perf_counter()
                model(x, y).backward()
                optimizer.step()
                optimizer.zero_grad()
                torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - begin)
        for job in jobs.values():
            job.close()
    medians = {name: statistics.median(each[3:]) for name, each in seconds.items()}
    bare = medians.pop("plain torch")
    rows = [report.Row("step", bare, "s", case={"side": "plain torch"})]
    return rows + [
        report.Row("step", each, "s", "plain torch", each / bare, case={"side": kind}) for kind, each in medians.items()
    ]


def _median(rounds: int, act: Callable[[], object]) -> float:
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def main() -> int:
    if why := nccl.why_not():
        report.parser(__doc__).parse_args()
        print(f"no GPU: {why}, so nothing was measured")
        return 0
    return report.main(__doc__, run)


if __name__ == "__main__":
    sys.exit(main())
