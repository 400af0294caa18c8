"""`trainer.layer_by_layer`: the gradients of one micro-batch after the other, for one pull of each layer."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn

import trainer
from ps import LocalCluster
from tests.models import Block, seeded
from tests.trainer.runs import gathered_values

WIDTH = 64


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList([Block(WIDTH) for _ in range(4)])
        self.head = nn.Linear(WIDTH, 11)

    def forward(self, micro_batches: Sequence[torch.Tensor]) -> torch.Tensor:
        """The sum of the losses."""
        activations = [self.embedding(tokens) for tokens in reversed(micro_batches)]
        activations = trainer.layer_by_layer(self.blocks, activations[::-1])
        losses = [
            nn.functional.cross_entropy(self.head(activation).flatten(0, 1), tokens.flatten())
            for activation, tokens in reversed(list(zip(activations, micro_batches, strict=True)))
        ]
        return torch.stack(losses).sum()


def micro_batches(step: int, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randint(11, (2, 5), generator=generator) for _ in range(count)]


def test_gradients_are_those_of_one_micro_batch_after_the_other(cluster: LocalCluster, job_name: str) -> None:
    plain = seeded(Stack)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True)
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(seeded(Stack), job)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)
        for step in range(3):
            batches = micro_batches(step, 5)
            loss = model(batches)
            with optimizer.last_backward():
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            for batch in batches:
                plain([batch]).backward()
            reference.step()
            reference.zero_grad()
        for name, values in gathered_values(model).items():
            assert torch.equal(values, plain.get_parameter(name)), name


@pytest.mark.parametrize("count", [1, 6])
def test_a_layer_is_pulled_once_in_each_direction(cluster: LocalCluster, job_name: str, count: int) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = seeded(Stack)
        block = sum(param.numel() * 4 for param in model.blocks[0].parameters())
        config = trainer.OffloadConfig(
            max_live_bytes=block, param_persistence_threshold=0, max_reuse_distance=WIDTH * 300
        )
        trainer.offload(model, job, config)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=1e-2)
        for step in range(4):
            pulled, pushed = job.stats.bytes_pulled, job.stats.bytes_pushed
            model(micro_batches(step, count)).backward()
            optimizer.step()
            optimizer.zero_grad()
        size = sum(param.numel() * 4 for param in model.parameters())
        assert job.stats.bytes_pushed - pushed == size
        assert job.stats.bytes_pulled - pulled <= 2 * size
