"""A step that fails on one server fails for all: training goes on from a state in which no chunk is ahead."""

from pathlib import Path

import pytest
import torch

import trainer
from ps import LocalCluster
from tests.trainer.runs import Deep, gathered_values

LAYERS, WIDTH = 16, 256


def build() -> Deep:
    torch.manual_seed(0)
    return Deep(LAYERS, WIDTH)


def one_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step))
    model(x).pow(2).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def offloaded(job: trainer.Job) -> tuple[Deep, trainer.RemoteOptimizer]:
    model = build()
    trainer.offload(model, job, trainer.OffloadConfig(param_persistence_threshold=0))
    return model, trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)


def lose_spilled_state(data_dir: Path) -> int:
    """As a disk that loses files would; how many."""
    lost = 0
    for array in ("exp_avg", "exp_avg_sq"):
        for file in data_dir.glob(f"default/working/*/{array}/*/c/**/*"):
            if file.is_file():
                file.unlink()
                lost += 1
    return lost


def test_an_update_that_fails_on_one_server_is_undone_on_the_other(tmp_path: Path) -> None:
    plain = build()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True)
    for step in range(5):
        one_step(plain, optimizer, step)
    with LocalCluster(2, data_dir=tmp_path, memory="3MiB") as cluster:
        with trainer.connect(cluster.addresses, rank=0, world_size=1, timeout=60) as job:
            model, remote = offloaded(job)
            for step in range(2):
                one_step(model, remote, step)
            job.commit()
            one_step(model, remote, 2)
            gathered_values(model)
            assert lose_spilled_state(cluster.data_dirs[1]) > 0
            # The first update that needs what is lost fails; all that follows says so.
            with pytest.raises(trainer.ServerFailure, match="shard-1|shard 1"):
                for step in range(3, 6):
                    one_step(model, remote, step)
                    gathered_values(model)
            assert job.step >= 4
            with pytest.raises(trainer.ServerFailure):
                job.commit()
        with trainer.connect(cluster.addresses, rank=0, world_size=1, timeout=60) as job:
            # Server 0 made the step, and goes back with the other.
            assert job.step == 2
            model, remote = offloaded(job)
            assert {int(values["step"]) for _, values in remote.state_items()} == {2}
            for step in range(2, 5):
                one_step(model, remote, step)
            for name, value in gathered_values(model).items():
                assert torch.equal(value, plain.get_parameter(name)), name
