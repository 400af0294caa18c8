"""A job that goes on with another number of servers goes on as if nothing had happened."""

from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from torch import nn

import ps
import trainer
from ps import LocalCluster
from ps.tools.resharding import reshard
from ps.tools.verification import verify
from tests.models import Residual, batch, loss_of
from tests.ps.stored import read_with_tensorstore, unite
from tests.trainer.runs import adamw


class Frozen(Residual):
    """Two chunks each of embedding and head, and a part in bfloat16 that is not trained."""

    def __init__(self) -> None:
        super().__init__(vocabulary=24_000, width=96, layers=1)
        scale = torch.rand(96, generator=torch.Generator().manual_seed(1)) + 0.5
        self.scale = nn.Parameter(scale.bfloat16(), requires_grad=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) * self.scale.float()
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def train(folder: Path, servers: int, *commits: int) -> list[float]:
    """Goes on where the folder's commit is, and commits at some steps; the losses. No server runs in the end."""
    with LocalCluster(servers=servers, data_dir=folder) as cluster, trainer.connect(cluster.addresses) as job:
        torch.manual_seed(0)
        model = trainer.offload(Frozen(), job)
        optimizer = adamw(model.parameters())
        losses = []
        for step in range(job.step, commits[-1]):
            loss = loss_of(model, batch(step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if job.step in commits:
                job.commit()
    return losses


def folders(root: Path, servers: int) -> list[Path]:
    return [root / f"shard-{i}" for i in range(servers)]


@pytest.mark.slow
def test_two_to_three_to_one_to_four_servers_gives_the_same_bits(tmp_path: Path) -> None:
    expected = train(tmp_path / "2", 2, 2, 8)
    here, losses = folders(tmp_path / "2", 2), expected[:2]
    for servers, until in ((3, 4), (1, 6), (4, 8)):
        there = folders(tmp_path / str(servers), servers)
        reshard(here, there, step=until - 2)
        assert verify(there).ok
        losses += train(tmp_path / str(servers), servers, until)
        here = there
    assert losses == expected
    assert verify(here).ok
    found, undisturbed = ps.open_generation(here), ps.open_generation(folders(tmp_path / "2", 2))
    union = unite([folder / "default/generations/00000008" for folder in here], tmp_path / "union")
    paths = {path for path, node in undisturbed.members(max_depth=None) if isinstance(node, zarr.Array)}
    assert {"weight/scale", "exp_avg_sq/head.weight", "step/embedding.weight"} <= paths
    for path in paths:
        bits = np.asarray(undisturbed[path][...]).tobytes()
        assert np.asarray(found[path][...]).tobytes() == bits, path
        assert read_with_tensorstore(union, path).tobytes() == bits, path
