"""The work that all sides of a comparison do: one model, one stream of data, one precision."""

import json
from dataclasses import asdict, dataclass, replace

import torch

from trainer.app.data import Corpus, standard_library
from trainer.app.gpt import GPT, GPTConfig

LEARNING_RATE = 3e-5

STATE_BYTES = 12
"""Of each parameter on a server: an fp32 master and AdamW's two moments."""


@dataclass(frozen=True)
class Workload:
    """A GPT over bytes in bf16 under AdamW with fp32 masters, by `world_size` processes of `threads` threads.

    batch, length: the sequences of each process at each step, and their tokens.
    options: what only one side understands, as the addresses of servers.
    """

    batch: int = 4
    length: int = 256
    layers: int = 12
    width: int = 1024
    heads: int = 16
    rank: int = 0
    world_size: int = 1
    threads: int = 2
    seed: int = 0
    options: tuple[tuple[str, str], ...] = ()

    def with_options(self, **options: str) -> "Workload":
        return replace(self, options=tuple(options.items()))

    def option(self, name: str) -> str | None:
        return dict(self.options).get(name)

    def model(self) -> GPT:
        """The same initial values on every side, in fp32."""
        torch.manual_seed(self.seed)
        return GPT(GPTConfig(self.layers, self.width, self.heads, max(256, self.length)))

    @property
    def parameters(self) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.model().parameters())

    def memory_limit(self, share: float, servers: int) -> int:
        """Bytes for each server: that share of its part of weights and optimizer state, and at least what an update of
        the largest chunk needs."""
        chunk = min(4 * self.width * self.width * 4, 8 << 20)
        return max(10 * chunk, int(share * STATE_BYTES * self.parameters / servers))

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def decode(text: str) -> "Workload":
        fields = json.loads(text)
        fields["options"] = tuple((name, value) for name, value in fields["options"])
        return Workload(**fields)


class Batches:
    """What a process trains on, by step. rank: of another process, to do its work as well."""

    def __init__(self, work: Workload) -> None:
        self._work = work
        self._corpus = Corpus.read(standard_library())

    def at(self, step: int, rank: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, each (batch, length), int64."""
        work = self._work
        return self._corpus.batch(
            seed=work.seed,
            step=step,
            rank=work.rank if rank is None else rank,
            size=work.batch,
            context=work.length,
        )
