"""The moving average of weights that servers keep: torch's bits, through commits, spills and resharding."""

import contextlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import trainer
from ps import LocalCluster
from ps.cli import main
from tests.trainer.runs import gathered_values
from tests.trainer.semantics import script as scripts
from tests.trainer.semantics.groups import run_group

DECAY = 0.9
SMALL = scripts.Script("AdamW", {"lr": 0.02})
SCRIPT = scripts.Script("AdamW", {"lr": 0.02}, rows=4500)
"""With a parameter of several chunks."""


def plain(steps: int) -> tuple[scripts.Mixed, scripts.Mixed, list[float]]:
    model = scripts.build(SCRIPT)
    optimizer = torch.optim.AdamW(scripts.param_groups(SCRIPT, model), lr=0.02, fused=True)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    losses = []
    for step in range(steps):
        one_step(model, optimizer, step)
        average.update_parameters(model)
        with torch.no_grad():
            losses.append(average(*inputs(step)).item())
    return model, average.module, losses


def inputs(step: int) -> tuple[torch.Tensor, bool]:
    # What is used every second time has an average that follows although it has no gradient.
    return torch.randn(4, 7, generator=torch.Generator().manual_seed(step)), step % 2 == 0


def one_step(model: Any, optimizer: Any, step: int) -> None:
    # Also where chunks are updated before the step, and those without a gradient with it.
    with optimizer.last_backward() if hasattr(optimizer, "last_backward") else contextlib.nullcontext():
        model(*inputs(step)).backward()
    optimizer.step()
    optimizer.zero_grad()


def train(
    job: trainer.Job, until: int, script: scripts.Script = SCRIPT, **options: Any
) -> tuple[scripts.Mixed, list[float]]:
    model = scripts.build(script)
    trainer.offload(model, job)
    groups = scripts.param_groups(script, model)
    optimizer = trainer.RemoteOptimizer(groups, torch.optim.AdamW, lr=0.02, **{"ema_decay": DECAY, **options})
    losses = []
    while job.step < until:
        one_step(model, optimizer, step := job.step)
        with trainer.ema_weights(model), torch.no_grad():
            losses.append(model(*inputs(step)).item())
    return model, losses


def averages(model: scripts.Mixed) -> dict[str, torch.Tensor]:
    with trainer.ema_weights(model):
        return gathered_values(model)


def check(model: scripts.Mixed, expected: tuple[scripts.Mixed, scripts.Mixed, list[float]]) -> None:
    for values, reference in ((averages(model), expected[1]), (gathered_values(model), expected[0])):
        for name, value in values.items():
            assert torch.equal(value, reference.get_parameter(name)), name


@pytest.mark.parametrize("memory", [None, "80MiB"])
def test_it_is_the_average_of_torch_through_a_restart(tmp_path: Path, memory: str | None) -> None:
    expected = plain(4)
    with LocalCluster(2, data_dir=tmp_path, memory=memory) as cluster:
        with trainer.connect(cluster.addresses, rank=0, world_size=1, timeout=60) as job:
            model, before = train(job, 2)
            check(model, plain(2))
            job.commit()
        for server in range(2):
            cluster.restart(server)
        # Whoever only reads has it too, before anybody states an optimizer.
        with trainer.connect(cluster.addresses, read_only=True, timeout=60) as job:
            model = trainer.offload(scripts.build(SCRIPT), job)
            check(model, plain(2))
        with trainer.connect(cluster.addresses, rank=0, world_size=1, timeout=60) as job:
            model, after = train(job, 4)
            check(model, expected)
            assert before + after == expected[2]
            with trainer.gathered(model.first, ema=True):
                assert torch.equal(model.first.weight, expected[1].first.weight)
            with trainer.gathered(model.first):
                assert torch.equal(model.first.weight, expected[0].first.weight)
            job.commit()


def test_tools_check_reshard_and_export_it(tmp_path: Path) -> None:
    with LocalCluster(2, data_dir=tmp_path) as cluster, trainer.connect(cluster.addresses) as job:
        model, _ = train(job, 2, SMALL)
        expected = averages(model)
        job.commit()
    folders = [str(tmp_path / f"shard-{server}") for server in range(2)]
    assert main(["verify", *folders]) == 0
    whole = tmp_path / "one"
    assert main(["reshard", "--from", *folders, "--to", str(whole / "shard-0")]) == 0
    with LocalCluster(1, data_dir=whole) as cluster, trainer.connect(cluster.addresses) as job:
        model, _ = train(job, 2, SMALL)
        assert all(torch.equal(value, expected[name]) for name, value in averages(model).items())
    assert main(["export", *folders, "--format", "torch", "--state", "--out", str(tmp_path / "exported")]) == 0
    state = torch.load(tmp_path / "exported" / "optimizer.pt")["state"]
    assert {name for values in state.values() for name in values} == {"step", "exp_avg", "exp_avg_sq"}
    average = torch.load(tmp_path / "exported" / "ema.pt")
    assert "first.weight" in average
    assert all(torch.equal(value, expected[name]) for name, value in average.items())


def test_without_a_decay_there_is_none_and_what_there_was_is_dropped(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model, _ = train(job, 1, SMALL)
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(scripts.build(SMALL), job)
        groups = scripts.param_groups(SMALL, model)
        optimizer = trainer.RemoteOptimizer(groups, torch.optim.AdamW, lr=0.02)
        assert optimizer.ema_decay is None
        with pytest.raises(trainer.ConfigError, match="no average of the weights is kept"), trainer.ema_weights(model):
            pass
    with (
        trainer.connect(cluster.addresses, job=job_name, read_only=True) as job,
        pytest.raises(trainer.RequestRefused, match="keeps no moving average"),
    ):
        model = trainer.offload(scripts.build(SMALL), job)
        with trainer.ema_weights(model):
            gathered_values(model)


def test_inside_there_is_no_training(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = scripts.build(SMALL)
        trainer.offload(model, job)
        optimizer = trainer.RemoteOptimizer(scripts.param_groups(SMALL, model), torch.optim.SGD, lr=0.02, ema_decay=0.5)
        one_step(model, optimizer, 0)
        loss = model(*inputs(1))
        with trainer.ema_weights(model):
            with pytest.raises(trainer.ConfigError, match="no step inside"):
                optimizer.step()
            with pytest.raises(trainer.ConfigError, match="for evaluation"):
                model(*inputs(1)).backward()
            with pytest.raises(RuntimeError, match="cannot be changed inside"):
                model.load_state_dict(scripts.build(SMALL).state_dict())
            inside = model(*inputs(1))
        with pytest.raises(RuntimeError, match="replaced between forward and backward"):
            inside.backward()
        with (
            pytest.raises(trainer.ConfigError, match="whole inside"),
            trainer.gathered(model.first),
            trainer.ema_weights(model),
        ):
            pass
        # A graph from before is whole again.
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"gradient_reduction": "sum"}, {}, "gradient_reduction: it is (mean|sum) on rank . and (mean|sum)"),
        ({}, {"ema_decay": 0.5}, "ema_decay: it is (None|0.5) on rank . and (None|0.5)"),
    ],
)
def test_ranks_that_disagree_are_told(
    cluster: LocalCluster, job_name: str, config: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    models = [torch.nn.Linear(3, 2) for _ in range(2)]

    def state(job: trainer.Job) -> str:
        own = job.rank == 1
        model = trainer.offload(models[job.rank], job, trainer.OffloadConfig(**(config if own else {})))
        try:
            trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1, **(options if own else {}))
        except trainer.ZeroPsError as error:
            told = str(error)
        else:
            told = ""
        job.barrier("both have stated it")
        return told

    told = run_group(cluster.addresses, job_name, 2, state)
    # Each may have been the first one at some server.
    assert any(told)
    assert all(re.search(f"trainers disagree on {message}", text) for text in told if text)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_of_trainers_are_averaged_or_added(cluster: LocalCluster, job_name: str, reduction: str) -> None:
    models = [torch.nn.Linear(3, 1, bias=False) for _ in range(3)]
    torch.nn.init.zeros_(models[0].weight)

    def step(job: trainer.Job) -> tuple[torch.Tensor, float]:
        config = trainer.OffloadConfig(gradient_reduction=reduction)
        model = trainer.offload(models[job.rank], job, config)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=1.0)
        (model(torch.full((1, 3), 1.0 + job.rank)).sum()).backward()
        norm = trainer.clip_grad_norm_(model.parameters(), 100.0, float("inf"))
        optimizer.step()
        return gathered_values(model)["weight"], norm.item()

    expected = {"mean": 2.0, "sum": 6.0}[reduction]
    for weight, norm in run_group(cluster.addresses, job_name, 3, step):
        assert torch.equal(weight, torch.full((1, 3), -expected))
        assert norm == expected
