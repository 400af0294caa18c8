"""16-bit compute with fp32 masters: the bits of the same scheme in plain torch, however many trainers."""

import random
import time
from typing import Any

import pytest
import torch

import trainer
from ps import LocalCluster
from tests.models import Residual, batch, loss_of, seeded
from tests.trainer.semantics.groups import run_group

STEPS = 3


def plain(dtype: torch.dtype, reduce_dtype: torch.dtype | None, trainers: int) -> dict[str, dict[str, torch.Tensor]]:
    """Each trainer's gradients of the 16-bit copy travel in `reduce_dtype`, add up over micro-batches in fp32, and are
    averaged in rank order."""
    computes = [seeded(Residual).to(dtype) for _ in range(trainers)]
    masters = {n: p.detach().clone().requires_grad_() for n, p in seeded(Residual).named_parameters() if p.numel()}
    optimizer = torch.optim.AdamW(masters.values(), lr=1e-2, fused=True)
    for step in range(STEPS):
        totals: dict[str, torch.Tensor] = {}
        for rank, compute in enumerate(computes):
            with torch.no_grad():
                for name, master in masters.items():
                    compute.get_parameter(name).copy_(master)
            sums: dict[str, torch.Tensor] = {}
            for part in range(2):
                compute.zero_grad()
                loss_of(compute, batch(100 * step + 10 * rank + part)).backward()
                for name in masters:
                    gradient = compute.get_parameter(name).grad
                    sent = gradient.to(reduce_dtype or dtype).float()
                    sums[name] = sums[name] + sent if name in sums else sent
            for name, value in sums.items():
                totals[name] = totals[name] + value if name in totals else value.clone()
        for name, master in masters.items():
            master.grad = totals[name] / trainers if trainers > 1 else totals[name]
        optimizer.step()
        optimizer.zero_grad()
    return {
        name: {"weight": master.detach(), **{k: v for k, v in optimizer.state[master].items() if k != "step"}}
        for name, master in masters.items()
    }


@pytest.mark.parametrize("trainers", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "reduce_dtype"),
    [
        (torch.bfloat16, None),
        (torch.bfloat16, torch.float32),
        (torch.float16, None),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
    ],
    ids=str,
)
def test_weights_and_moments_have_the_bits_of_the_scheme_in_plain_torch(
    cluster: LocalCluster, job_name: str, dtype: torch.dtype, reduce_dtype: torch.dtype | None, trainers: int
) -> None:
    models = [seeded(Residual) for _ in range(trainers)]

    def train(job: trainer.Job) -> dict[str, dict[str, torch.Tensor]]:
        config = trainer.OffloadConfig(param_dtype=dtype, reduce_dtype=reduce_dtype)
        model = trainer.offload(models[job.rank], job, config)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)
        late = random.Random(job.rank)
        for step in range(STEPS):
            for part in range(2):
                # Whoever comes first must not matter.
                time.sleep(late.random() / 50)
                loss_of(model, batch(100 * step + 10 * job.rank + part)).backward()
            optimizer.step()
            optimizer.zero_grad()
        found: dict[str, dict[str, Any]] = {}
        with trainer.gathered(model):
            for name, param in model.named_parameters():
                if param.numel():
                    found[name] = {"weight": param.detach().clone(), **optimizer.state_for(param)}
        return found

    expected = plain(dtype, reduce_dtype, trainers)
    for found in run_group(cluster.addresses, job_name, trainers, train):
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            for key, value in values.items():
                actual = found[name][key]
                assert torch.equal(actual, value.to(actual.dtype)), (name, key)
                assert key == "weight" or actual.dtype == torch.float32
