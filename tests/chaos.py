"""Training while servers and trainers are killed, stopped and cut off at random: `python -m tests.chaos --faults 100`.

Trainers reach servers through proxies that can reset connections or fall silent. Servers and trainers that were
killed are started again, as a supervisor does. All the while every loss has to be that of an undisturbed run of plain
torch, bit for bit; in the end the parameters, too; and after each fault everybody has to get on within a deadline.
"""

import argparse
import functools
import os
import queue
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import torch

from ps import LocalCluster
from ps.tools.certs import make_certs
from ps.tools.verification import verify
from tests.forks import Process
from tests.models import Residual, batch, loss_of, seeded
from tests.proxy import Proxy
from tests.ranks import free_port, start_rank
from tests.trainer.chaos_rank import RESTART

SERVERS = 2
LEASE_SECONDS = 3.0
DEADLINE_SECONDS = 240.0
"""In which everybody has to make steps again after a fault. Long: the machine may be busy."""

FAULTS = {
    "a server killed": 3,
    "all servers killed": 1,
    "servers told to stop": 2,
    "a server stopped": 4,
    "a trainer killed": 3,
    "a trainer stopped": 4,
    "a connection cut": 5,
    "a connection silent": 5,
    "a trainer cut off": 3,
}
"""Kinds, and how often each comes."""


@dataclass(frozen=True)
class Variant:
    """What kind of training it is.

    trainers: to begin with, where it is elastic. group: they move parameters together. secured: with mutual TLS and
    tokens. staleness: with more than 0 there is no result that could be compared; it has to be finite.
    commit_every: steps. links: kinds that trainers may use; shm goes around the proxies. memory: of each server.
    """

    trainers: int = 1
    elastic: bool = False
    group: bool = False
    secured: bool = False
    staleness: int = 0
    commit_every: int = 4
    links: tuple[str, ...] | None = ("grpc",)
    memory: str | None = None


VARIANTS = {
    "one": Variant(),
    "two": Variant(trainers=2),
    "elastic": Variant(trainers=2, elastic=True),
    "group": Variant(trainers=2, group=True),
    "secured": Variant(trainers=2, secured=True),
    "stale": Variant(trainers=2, staleness=2),
    "few-commits": Variant(trainers=2, commit_every=23),
}


class Undisturbed:
    """The same run in plain torch: losses by step and rank, parameters by step.

    world_sizes: how many trainers made a step.
    """

    def __init__(self, world_sizes: Callable[[int], int]) -> None:
        self._world_sizes = world_sizes
        self._model = seeded(Residual)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-2, fused=True)
        self._losses: list[list[float]] = []

    def loss(self, step: int, rank: int) -> float:
        while len(self._losses) <= step:
            self._step(len(self._losses))
        return self._losses[step][rank]

    def parameters(self, step: int) -> dict[str, torch.Tensor]:
        """After so many steps; asked for once, in the end."""
        again = Undisturbed(self._world_sizes)
        for number in range(step):
            again._step(number)
        return {name: param.detach() for name, param in again._model.named_parameters()}

    def _step(self, step: int) -> None:
        losses, size = [], self._world_sizes(step)
        totals: list[torch.Tensor | None] = [None] * len(list(self._model.parameters()))
        for tokens in batch(step).chunk(size):
            loss = loss_of(self._model, tokens)
            gradients = torch.autograd.grad(loss, list(self._model.parameters()), allow_unused=True)
            for number, gradient in enumerate(gradients):
                if gradient is not None:
                    total = totals[number]
                    totals[number] = gradient.clone() if total is None else total.add_(gradient)
            losses.append(loss.item())
        for param, total in zip(self._model.parameters(), totals, strict=True):
            param.grad = total if total is None or size == 1 else total.div_(size)
        self._optimizer.step()
        self._losses.append(losses)


@dataclass
class Tally:
    """faults: by kind. rewinds: times that a trainer went back, and steps that were made again."""

    faults: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    rewinds: int = 0
    gave_up: int = 0
    steps: int = 0
    final_step: int = 0
    longest: float = 0.0

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(self.faults.items()))
        lost = ", ".join(f"{count} {name}" for name, count in self.lost.most_common()) or "nothing"
        return (
            f"{self.faults.total()} faults ({kinds}); trainers heard of {lost}; {self.rewinds} rewinds, "
            f"{self.gave_up} restarts by the supervisor; {self.steps} steps of which {self.final_step} count; at most "
            f"{self.longest:.1f} s until all went on"
        )


class Rank:
    """One trainer, its network, and who starts it again."""

    def __init__(self, chaos: "Chaos", rank: int, targets: Sequence[str]) -> None:
        self.rank = rank
        self._chaos = chaos
        self.proxies = [Proxy(target) for target in targets]
        self.result = chaos.folder / f"rank-{rank}.pt"
        self.steps = 0
        self.at = -1
        self.done = False
        self.killed = False
        self.output: list[str] = []
        self.process: Process

    def start(self, port: int = 0) -> None:
        """port: where the process group is formed, in group mode."""
        variant = self._chaos.variant
        self.killed = False
        self.process = start_rank(
            "trainer.chaos_rank:run",
            [proxy.address for proxy in self.proxies],
            self.rank,
            variant.trainers,
            self._chaos.folder / "unused.pt",
            stop_file=str(self._chaos.stop_file),
            found=str(self.result),
            links=variant.links and list(variant.links),
            # In group mode nobody is started again before all have ended.
            patience=30.0 if variant.group else DEADLINE_SECONDS / 2,
            elastic=variant.elastic,
            port=port,
            secrets=str(self._chaos.secrets or ""),
            staleness=variant.staleness,
            commit_every=variant.commit_every,
        )
        threading.Thread(target=self._listen, args=(self.process,), daemon=True).start()

    def _listen(self, process: Process) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.output = [*self.output[-200:], line]
            if line.startswith("chaos "):
                self._hear(line.split()[1:])
        process.wait()
        if not self.done and process is self.process:
            self._chaos.ended.put(self)

    def _hear(self, words: list[str]) -> None:
        tally, kind = self._chaos.tally, words[0]
        if kind == "step":
            step, rank, world_size = map(int, words[1:4])
            self._chaos.sizes[step] = world_size
            self._chaos.check_loss(step, rank, words[4])
            self.steps += 1
            self.at = step
            tally.steps += 1
        elif kind == "made":
            # Its answer was lost. If another one has seen it, that one knows.
            self._chaos.sizes.setdefault(int(words[1]), int(words[3]))
        elif kind == "rewound":
            tally.rewinds += 1
        elif kind == "lost":
            tally.lost[words[1]] += 1
        elif kind == "done":
            self.done = True

    def close(self) -> None:
        self.done = True
        self.process.kill()
        self.process.wait()
        for proxy in self.proxies:
            proxy.close()


class Chaos:
    """A cluster and its trainers.

    sizes: how many trainers made each step, as the last one said that made it.
    """

    def __init__(self, folder: Path, seed: int, variant: Variant, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.variant = variant
        self.secrets: Path | None = None
        self.tally = Tally()
        self.stop_file = folder / "stop-at"
        self.ended: queue.SimpleQueue[Rank] = queue.SimpleQueue()
        self.wrong: str | None = None
        self.sizes: dict[int, int] = {}
        self._say = say
        self._random = random.Random(seed)
        self._undisturbed = Undisturbed(lambda step: self.sizes[step] if variant.elastic else variant.trainers)
        self._undisturbed_lock = threading.Lock()
        self._stack = ExitStack()
        if variant.secured:
            self.secrets = folder / "secrets"
            make_certs(self.secrets, [], timedelta(days=2))
        self._cluster = self._stack.enter_context(
            LocalCluster(
                SERVERS,
                data_dir=folder / "data",
                lease=LEASE_SECONDS,
                memory=variant.memory,
                tls=self.secrets,
                tokens=self.secrets and self.secrets / "tokens",
            )
        )
        self._ranks = [Rank(self, rank, self._cluster.addresses) for rank in range(variant.trainers)]
        self._start(self._ranks)
        for rank in self._ranks:
            self._stack.callback(rank.close)

    def _start(self, ranks: Sequence[Rank]) -> None:
        port = free_port() if self.variant.group else 0
        for rank in ranks:
            rank.start(port)

    def check_loss(self, step: int, rank: int, found: str) -> None:
        """Notes a loss that is not that of the undisturbed run, where that is known by now."""
        if self.variant.elastic or self.variant.staleness:
            return
        with self._undisturbed_lock:
            expected = self._undisturbed.loss(step, rank)
        if float.fromhex(found) != expected:
            self.wrong = f"rank {rank}, step {step}: {found}, undisturbed {expected.hex()}"

    def run(self, faults: int) -> Tally:
        with self._stack:
            self._wait_for_steps(2)
            while self.tally.faults.total() < faults:
                kind = self._random.choices(list(FAULTS), list(FAULTS.values()))[0]
                number = self.tally.faults.total() + 1
                began = time.monotonic()
                with self._fault(kind) as what:
                    self._say(f"fault {number}/{faults} at step {max(r.at for r in self._ranks)}: {kind}, {what}")
                self.tally.faults[kind] += 1
                if self._random.random() < 0.75 or number == faults:
                    self._wait_for_steps(2)
                    self.tally.longest = max(self.tally.longest, time.monotonic() - began)
                else:
                    # The next fault comes in the middle of the recovery from this one.
                    self._sleep(0.0, 2.0)
            self._finish()
        return self.tally

    @contextmanager
    def _fault(self, kind: str) -> Iterator[str]:
        """Does it, and mends what does not mend itself."""
        self._sleep(0.0, 0.7)
        server = self._random.randrange(SERVERS)
        rank = self._random.choice(self._ranks)
        short, long = (0.1, LEASE_SECONDS / 2), (LEASE_SECONDS + 0.5, LEASE_SECONDS + 2.5)
        match kind:
            case "a server killed" | "all servers killed" | "servers told to stop":
                servers = [server] if kind == "a server killed" else list(range(SERVERS))
                yield f"{servers}"
                if kind == "servers told to stop":
                    self._cluster.stop(*servers)
                else:
                    for each in servers:
                        self._cluster.kill(each)
                self._sleep(0.0, 1.0)
                for each in servers:
                    self._cluster.restart(each)
            case "a trainer killed":
                yield f"rank {rank.rank}"
                rank.killed = True
                rank.process.kill()
            case "a server stopped" | "a trainer stopped":
                pid = self._cluster.pid(server) if kind == "a server stopped" else rank.process.pid
                for_seconds = self._random.choice([short, long, long])
                yield f"{server if kind == 'a server stopped' else rank.rank} for about {for_seconds[0]:.1f} s"
                _signal(pid, signal.SIGSTOP)
                self._sleep(*for_seconds)
                _signal(pid, signal.SIGCONT)
            case "a connection cut" | "a connection silent" | "a trainer cut off":
                proxies = rank.proxies if kind == "a trainer cut off" else [rank.proxies[server]]
                silent = kind == "a connection silent" or (kind == "a trainer cut off" and self._random.random() < 0.5)
                for_seconds = self._random.choice([short, long])
                yield f"rank {rank.rank}, server {server}, {'silent' if silent else 'reset'} {for_seconds[0]:.1f} s"
                for proxy in proxies:
                    proxy.stall() if silent else proxy.cut()
                self._sleep(*for_seconds)
                for proxy in proxies:
                    proxy.heal()

    def _sleep(self, least: float, most: float) -> None:
        end = time.monotonic() + self._random.uniform(least, most)
        while (left := end - time.monotonic()) > 0:
            self._supervise(min(left, 0.05))

    def _supervise(self, seconds: float) -> None:
        """Starts trainers again that have ended, as torchrun does. Raises for what should not have ended."""
        assert self.wrong is None, self.wrong
        try:
            rank = self.ended.get(timeout=seconds)
        except queue.Empty:
            return
        status = rank.process.returncode
        if not rank.killed:
            assert status == RESTART, f"rank {rank.rank} ended with {status}:\n{''.join(rank.output)}"
            self.tally.gave_up += 1
        if not self.variant.group:
            self._start([rank])
            return
        # As torchrun does, but the others are to find out by themselves.
        end = time.monotonic() + DEADLINE_SECONDS
        late = {other for other in self._ranks if other is not rank}
        while late:
            assert time.monotonic() < end, self._describe(sorted(late, key=lambda each: each.rank))
            with suppress(queue.Empty):
                other = self.ended.get(timeout=0.2)
                status = other.process.returncode
                assert other.killed or status == RESTART, f"rank {other.rank}, {status}:\n{''.join(other.output)}"
                late.discard(other)
        self._start(self._ranks)

    def _wait_for_steps(self, count: int) -> None:
        """Returns when every trainer has made so many steps from here on."""
        wanted = {rank: rank.steps + count for rank in self._ranks}
        end = time.monotonic() + DEADLINE_SECONDS
        while late := [rank for rank, steps in wanted.items() if rank.steps < steps]:
            self._supervise(0.02)
            if time.monotonic() > end:
                raise AssertionError(self._describe(late))

    def _describe(self, late: Sequence[Rank]) -> str:
        for rank in late:
            _signal(rank.process.pid, signal.SIGUSR1)
        time.sleep(2)
        outputs = "\n".join(f"rank {rank.rank}:\n{''.join(rank.output)}" for rank in late)
        logs = "\n".join(f"server {server}:\n{self._cluster.log(server)[-4000:]}" for server in range(SERVERS))
        return f"ranks {[r.rank for r in late]} made no steps for {DEADLINE_SECONDS:g} s\n{outputs}\n{logs}"

    def _finish(self) -> None:
        last = max(rank.at for rank in self._ranks) + 6
        self.stop_file.with_suffix(".new").write_text(str(last))
        self.stop_file.with_suffix(".new").rename(self.stop_file)
        end = time.monotonic() + DEADLINE_SECONDS
        while late := [rank for rank in self._ranks if not rank.done]:
            self._supervise(0.05)
            assert time.monotonic() < end, self._describe(late)
        assert self.wrong is None, self.wrong
        self.tally.final_step = last
        expected = {} if self.variant.staleness else self._undisturbed.parameters(last)
        for rank in self._ranks:
            found = torch.load(rank.result)
            assert found["step"] == last, (rank.rank, found["step"], last)
            assert all(value.isfinite().all() for value in found["params"].values())
            for name, value in expected.items():
                assert torch.equal(found["params"][name], value), f"rank {rank.rank}: {name} differs"
        for rank in self._ranks:
            assert rank.process.wait(DEADLINE_SECONDS) == 0, "".join(rank.output)
        report = verify([folder for disks in self._cluster.disks for folder in disks], job="chaos")
        assert report.ok, report.problems


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def chaos(
    faults: int, seed: int, folder: Path, variant: Variant = VARIANTS["one"], say: Callable[[str], None] = print
) -> Tally:
    """Raises AssertionError for whatever is not as it has to be."""
    return Chaos(folder, seed, variant, say).run(faults)


def storm(faults: int, seed: int, variants: Mapping[str, Variant]) -> None:
    """So many faults in all, each variant its share; says what came of it."""
    for number, (name, variant) in enumerate(variants.items()):
        share = faults // len(variants) + (number < faults % len(variants))
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="zero-ps-chaos-") as folder:
            tally = chaos(share, seed, Path(folder), variant, functools.partial(print, flush=True))
        print(f"chaos: {name}: {tally}; in {time.monotonic() - began:.0f} s", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=100, help="in all (default: %(default)s)")
    parser.add_argument(
        "--variants",
        default=",".join(VARIANTS),
        help="which training, among which the faults are divided (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=None, help="(default: one of its own)")
    parser.add_argument(
        "--links",
        default="grpc",
        help="kinds that trainers may use; the proxies see gRPC only (default: %(default)s)",
    )
    parser.add_argument("--memory", default=None, help="of each server (default: no limit)")
    options = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
    torch.set_num_threads(1)
    print(f"chaos: {options.faults} faults, --seed {seed}", flush=True)
    links = tuple(options.links.split(","))
    chosen = {name: VARIANTS[name] for name in options.variants.split(",")}
    chosen = {name: replace(variant, links=links, memory=options.memory) for name, variant in chosen.items()}
    storm(options.faults, seed, chosen)
    print("chaos: all is as it has to be")
    return 0


if __name__ == "__main__":
    sys.exit(main())
