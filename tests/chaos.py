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
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ps import LocalCluster
from ps.tools.verification import verify
from tests.models import Residual, batch, loss_of, seeded
from tests.proxy import Proxy
from tests.ranks import start_rank
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


class Undisturbed:
    """The same run in plain torch: losses by step and rank, parameters by step."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._model = seeded(Residual)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-2, fused=True)
        self._losses: list[list[float]] = []

    def loss(self, step: int, rank: int) -> float:
        while len(self._losses) <= step:
            self._step(len(self._losses))
        return self._losses[step][rank]

    def parameters(self, step: int) -> dict[str, torch.Tensor]:
        """After so many steps; asked for once, in the end."""
        again = Undisturbed(self._world_size)
        for number in range(step):
            again._step(number)
        return {name: param.detach() for name, param in again._model.named_parameters()}

    def _step(self, step: int) -> None:
        losses = []
        totals: list[torch.Tensor | None] = [None] * len(list(self._model.parameters()))
        for tokens in batch(step).chunk(self._world_size):
            loss = loss_of(self._model, tokens)
            gradients = torch.autograd.grad(loss, list(self._model.parameters()), allow_unused=True)
            for number, gradient in enumerate(gradients):
                if gradient is not None:
                    total = totals[number]
                    totals[number] = gradient.clone() if total is None else total.add_(gradient)
            losses.append(loss.item())
        for param, total in zip(self._model.parameters(), totals, strict=True):
            param.grad = total if total is None or self._world_size == 1 else total.div_(self._world_size)
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
        self.process: subprocess.Popen[str]
        self.start()

    def start(self) -> None:
        self.killed = False
        self.process = start_rank(
            "trainer.chaos_rank:run",
            [proxy.address for proxy in self.proxies],
            self.rank,
            self._chaos.world_size,
            self._chaos.folder / "unused.pt",
            stop_file=str(self._chaos.stop_file),
            found=str(self.result),
            links=self._chaos.links,
            patience=DEADLINE_SECONDS / 2,
        )
        threading.Thread(target=self._listen, args=(self.process,), daemon=True).start()

    def _listen(self, process: "subprocess.Popen[str]") -> None:
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
            step = int(words[1])
            expected = self._chaos.undisturbed_loss(step, self.rank)
            if float.fromhex(words[2]) != expected:
                self._chaos.wrong = f"rank {self.rank}, step {step}: {words[2]}, undisturbed {expected.hex()}"
            self.steps += 1
            self.at = step
            tally.steps += 1
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
    """A cluster and its trainers. links: kinds that trainers may use; shm goes around the proxies."""

    def __init__(
        self,
        folder: Path,
        seed: int,
        world_size: int,
        links: list[str] | None,
        memory: str | None,
        say: Callable[[str], None],
    ) -> None:
        self.folder = folder
        self.world_size = world_size
        self.links = links
        self.tally = Tally()
        self.stop_file = folder / "stop-at"
        self.ended: queue.SimpleQueue[Rank] = queue.SimpleQueue()
        self.wrong: str | None = None
        self._say = say
        self._random = random.Random(seed)
        self._undisturbed, self._undisturbed_lock = Undisturbed(world_size), threading.Lock()
        self._stack = ExitStack()
        self._cluster = self._stack.enter_context(
            LocalCluster(SERVERS, data_dir=folder / "data", lease=LEASE_SECONDS, memory=memory)
        )
        self._ranks: list[Rank] = []
        for rank in range(world_size):
            self._ranks.append(made := Rank(self, rank, self._cluster.addresses))
            self._stack.callback(made.close)

    def undisturbed_loss(self, step: int, rank: int) -> float:
        with self._undisturbed_lock:
            return self._undisturbed.loss(step, rank)

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
        rank.start()

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
        expected = self._undisturbed.parameters(last)
        for rank in self._ranks:
            found = torch.load(rank.result)
            assert found["step"] == last, (rank.rank, found["step"], last)
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
    faults: int,
    seed: int,
    folder: Path,
    *,
    trainers: int = 1,
    links: list[str] | None = None,
    memory: str | None = None,
    say: Callable[[str], None] = print,
) -> Tally:
    """Raises AssertionError for whatever is not as it has to be."""
    return Chaos(folder, seed, trainers, links, memory, say).run(faults)


def storm(
    faults: int, seed: int, trainers: int | None = None, links: list[str] | None = None, memory: str | None = None
) -> None:
    """So many faults in all, half of them with one trainer and half with two; says what came of it."""
    half = faults // 2
    plans = [(faults, trainers)] if trainers else [(half, 1), (faults - half, 2)]
    for number, world_size in plans:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="zero-ps-chaos-") as folder:
            say = functools.partial(print, flush=True)
            tally = chaos(number, seed, Path(folder), trainers=world_size, links=links, memory=memory, say=say)
        print(f"chaos: {world_size} trainer(s): {tally}; in {time.monotonic() - began:.0f} s", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=100, help="in all (default: %(default)s)")
    parser.add_argument("--trainers", type=int, default=None, help="(default: half of the faults with 1, half with 2)")
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
    storm(options.faults, seed, options.trainers, options.links.split(","), options.memory)
    print("chaos: all is as it has to be")
    return 0


if __name__ == "__main__":
    sys.exit(main())
