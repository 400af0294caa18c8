"""A trainer closes right after its last step, when the other one has still to ask for that."""

import time
from pathlib import Path

import pytest
import torch

import trainer
from ps import LocalCluster
from tests.models import Residual, batch, loss_of, seeded
from tests.ranks import run_ranks
from tests.trainer.group_runs import join
from tests.trainer.runs import adamw, gathered_values


def train(addresses: list[str], job: str, store: str, mode: str, left: str) -> dict[str, torch.Tensor]:
    """Two steps, after which rank 0 leaves without a word; rank 1 asks for its last one when that is gone."""
    rank, world_size = join(store)
    with trainer.connect(addresses, job=job, timeout=60) as connection:
        model = trainer.offload(seeded(Residual), connection, trainer.OffloadConfig(mode=mode))
        optimizer = adamw(model.parameters())
        for step in range(2):
            loss = loss_of(model, batch(step).chunk(world_size)[rank])
            loss.backward()
            if rank == 1 and step == 1:
                end = time.monotonic() + 60
                while not Path(left).exists():
                    assert time.monotonic() < end
                    time.sleep(0.02)
            optimizer.step()
            optimizer.zero_grad()
        if rank == 1:
            connection.commit()
            return gathered_values(model)
    Path(left).touch()
    return {}


@pytest.mark.parametrize("mode", ["direct", "group"])
def test_its_last_step_is_made_by_the_others(cluster: LocalCluster, job_name: str, tmp_path: Path, mode: str) -> None:
    _, values = run_ranks(
        "trainer.test_leaving:train",
        cluster.addresses,
        2,
        job=job_name,
        store=str(tmp_path / "store"),
        mode=mode,
        left=str(tmp_path / "left"),
    )
    model = seeded(Residual)
    plain = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for step in range(2):
        (loss_of(model, batch(step).chunk(2)[0]) / 2).backward()
        (loss_of(model, batch(step).chunk(2)[1]) / 2).backward()
        plain.step()
        plain.zero_grad()
    for name, param in model.named_parameters():
        torch.testing.assert_close(values[name], param.detach(), rtol=1e-4, atol=1e-6)
