"""Optimizer state: given to plain torch and taken from it, and training goes on with the same bits."""

import itertools
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import trainer
from ps import LocalCluster
from tests.trainer.runs import gathered_values
from tests.trainer.semantics import script as scripts
from tests.trainer.semantics.groups import run_group

CLASSES: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "fused": True},
    "Adam": {"amsgrad": True, "fused": True},
    "AdamW": {"foreach": True},
    "Adagrad": {"fused": True},
    "RMSprop": {"momentum": 0.5, "centered": True, "foreach": False},
    "Adamax": {"foreach": True},
    "NAdam": {"foreach": True},
    "RAdam": {"foreach": False},
    "Adadelta": {"foreach": True},
    "ASGD": {"t0": 1.0, "foreach": False},
    "Rprop": {"foreach": True},
}

_jobs = itertools.count()


@pytest.fixture(scope="module", params=[(3, None), (2, "96MiB")], ids=lambda p: f"{p[0]}-{p[1] or 'memory'}")
def servers(request: pytest.FixtureRequest) -> Iterator[LocalCluster]:
    with LocalCluster(request.param[0], memory=request.param[1]) as cluster:
        yield cluster


def script(name: str) -> scripts.Script:
    return scripts.Script(name, {"lr": 0.02, **CLASSES[name]}, rows=4500)


def loop(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        model(torch.randn(4, 7, generator=generator), step % 2 == 0).backward()
        optimizer.step()
        optimizer.zero_grad()


def make(name: str) -> tuple[scripts.Mixed, list[dict[str, Any]], type[torch.optim.Optimizer], dict[str, Any]]:
    model = scripts.build(script(name))
    return model, scripts.param_groups(script(name), model), getattr(torch.optim, name), scripts.options(script(name))


@pytest.mark.parametrize("name", CLASSES)
def test_state_goes_to_plain_torch_and_comes_from_it(servers: LocalCluster, name: str) -> None:
    if len(servers.addresses) == 2 and name not in ("SGD", "Adam", "RMSprop"):
        pytest.skip("these three have state of every kind")
    plain, groups, cls, options = make(name)
    expected = cls(groups, **options)
    loop(plain, expected, range(4))
    with trainer.connect(servers.addresses, job=f"state{next(_jobs)}", rank=0, world_size=1, timeout=30) as job:
        model, groups, cls, options = make(name)
        trainer.offload(model, job)
        optimizer = trainer.RemoteOptimizer(groups, cls, **options)
        loop(model, optimizer, range(2))
        # On from here in plain torch.
        other, groups, cls, options = make(name)
        other.load_state_dict(gathered_values(model))
        going_on = cls(groups, **{**options, "lr": 1.0})
        state = optimizer.state_dict()
        assert state["param_groups"][0]["params"] == list(range(len(groups[0]["params"])))
        going_on.load_state_dict(state)
        loop(other, going_on, range(2, 4))
        assert_same(other, plain)
        # And from plain torch to servers: what they had is replaced.
        begun, groups, cls, options = make(name)
        start = cls(groups, **options)
        loop(begun, start, range(3))
        model.load_state_dict(begun.state_dict())
        optimizer.param_groups[0]["lr"] = 1.0
        optimizer.load_state_dict(start.state_dict())
        loop(model, optimizer, range(3, 4))
        for key, value in gathered_values(model).items():
            assert torch.equal(value, plain.get_parameter(key)), key
        check_state_equal(optimizer.state_dict(), expected.state_dict())


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for (name, param), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(param, expected), name


def check_state_equal(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual["param_groups"] == expected["param_groups"]
    assert actual["state"].keys() == expected["state"].keys()
    for number, values in expected["state"].items():
        assert actual["state"][number].keys() == values.keys()
        for name, value in values.items():
            assert torch.equal(actual["state"][number][name], value), (number, name)
            assert actual["state"][number][name].dtype == value.dtype


def test_state_of_single_parameters_is_read_and_replaced(servers: LocalCluster) -> None:
    with trainer.connect(servers.addresses, job=f"state{next(_jobs)}", rank=0, world_size=1, timeout=30) as job:
        model, groups, cls, options = make("AdamW")
        trainer.offload(model, job)
        optimizer = trainer.RemoteOptimizer(groups, cls, **options)
        assert optimizer.state_for(model.first.weight) == {}
        assert optimizer.state_dict()["state"] == {}
        loop(model, optimizer, range(3))
        state = optimizer.state_for(model.table.weight)
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert state["step"].shape == () and state["step"].item() == 3
        assert state["exp_avg"].shape == model.table.weight.shape
        assert optimizer.state_for(model.unused) == {}
        # Every second time.
        assert optimizer.state_for(model.sometimes.weight)["step"].item() == 2
        items = dict(optimizer.state_items())
        assert "unused" not in items
        assert torch.equal(items["table.weight"]["exp_avg"], state["exp_avg"])

        optimizer.load_state_for(model.gain, {"step": 7, "exp_avg": torch.tensor(0.5), "exp_avg_sq": torch.tensor(2.0)})
        assert {n: v.item() for n, v in optimizer.state_for(model.gain).items()} == {
            "step": 7.0,
            "exp_avg": 0.5,
            "exp_avg_sq": 2.0,
        }
        optimizer.load_state_for(model.table.weight, {})
        assert optimizer.state_for(model.table.weight) == {}
        loop(model, optimizer, range(3, 4))
        assert optimizer.state_for(model.table.weight)["step"].item() == 1
        assert optimizer.state_for(model.gain)["step"].item() == 8


def test_state_that_does_not_fit_is_refused_and_nothing_is_changed(servers: LocalCluster) -> None:
    with trainer.connect(servers.addresses, job=f"state{next(_jobs)}", rank=0, world_size=1, timeout=30) as job:
        model, groups, cls, options = make("AdamW")
        trainer.offload(model, job)
        optimizer = trainer.RemoteOptimizer(groups, cls, **options)
        loop(model, optimizer, range(1))
        before = optimizer.state_dict()
        with pytest.raises(ValueError, match="different number of parameter groups"):
            optimizer.load_state_dict({"state": {}, "param_groups": before["param_groups"][:1]})
        short = [{**group, "params": group["params"][1:]} for group in before["param_groups"]]
        with pytest.raises(ValueError, match="doesn't match the size"):
            optimizer.load_state_dict({"state": {}, "param_groups": short})
        for values, message in (
            (
                {"step": torch.tensor(1.0)},
                "'first.weight' has step; under its options the optimizer keeps exp_avg, exp",
            ),
            ({**before["state"][0], "exp_avg": torch.zeros(3)}, "exp_avg of parameter '.*' has shape"),
            ({**before["state"][0], "step": torch.zeros(2)}, "is one number"),
        ):
            with pytest.raises(ValueError, match=message):
                optimizer.load_state_for(model.first.weight, values)
        with pytest.raises(trainer.ConfigError, match="in no group"):
            optimizer.state_for(model.late.weight)
        check_state_equal(optimizer.state_dict(), before)


def test_loaded_state_is_committed_and_restored(tmp_path: Any) -> None:
    with LocalCluster(2, data_dir=tmp_path) as cluster:
        with trainer.connect(cluster.addresses, rank=0, world_size=1) as job:
            model, groups, cls, options = make("AdamW")
            trainer.offload(model, job)
            optimizer = trainer.RemoteOptimizer(groups, cls, **options)
            loop(model, optimizer, range(2))
            job.commit()
            optimizer.load_state_for(model.gain, {"step": 7, "exp_avg": torch.ones(()), "exp_avg_sq": torch.ones(())})
            job.commit()
            expected = optimizer.state_dict()
        for server in range(2):
            cluster.restart(server)
        with trainer.connect(cluster.addresses, rank=0, world_size=1) as job:
            model, groups, cls, options = make("AdamW")
            trainer.offload(model, job)
            optimizer = trainer.RemoteOptimizer(groups, cls, **options)
            check_state_equal(optimizer.state_dict(), expected)


def test_rank_0_state_counts_and_others_wait_for_it(servers: LocalCluster) -> None:
    def load(job: trainer.Job) -> torch.Tensor:
        model = trainer.offload(nn.Linear(3, 2), job)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
        optimizer.load_state_for(model.weight, {"momentum_buffer": torch.full((2, 3), 1.0 + job.rank)})
        return optimizer.state_for(model.weight)["momentum_buffer"]

    for found in run_group(servers.addresses, f"state{next(_jobs)}", 2, load):
        assert torch.equal(found, torch.ones(2, 3))


@pytest.mark.parametrize("culprit", [0, 1])
def test_state_that_does_not_fit_on_one_rank_is_refused_on_all(servers: LocalCluster, culprit: int) -> None:
    def load(job: trainer.Job) -> list[str]:
        model = trainer.offload(nn.Linear(3, 2), job)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
        good = {"momentum_buffer": torch.ones(2, 3)}
        optimizer.load_state_for(model.weight, good)
        whole = optimizer.state_dict()
        errors = []
        for action, bad in (
            (optimizer.load_state_dict, {**whole, "param_groups": []}),
            (lambda values: optimizer.load_state_for(model.weight, values), {"momentum_buffer": torch.ones(5)}),
        ):
            began = time.monotonic()
            with pytest.raises((ValueError, trainer.ConfigError)) as caught:
                action(bad if job.rank == culprit else (whole if bad.keys() == whole.keys() else good))
            # Nobody waits for its timeout, which is 30 seconds.
            assert time.monotonic() - began < 25
            errors.append(f"{type(caught.value).__name__}: {caught.value}")
        assert torch.equal(optimizer.state_for(model.weight)["momentum_buffer"], good["momentum_buffer"])
        # Those who have met go on together.
        optimizer.load_state_dict(whole)
        return errors

    for rank, (first, second) in enumerate(run_group(servers.addresses, f"state{next(_jobs)}", 2, load)):
        if rank == culprit:
            assert first.startswith("ValueError: loaded state dict has a different number")
            assert second.startswith("ValueError: momentum_buffer of parameter 'weight' has shape (5,)")
        else:
            assert first.startswith(
                f"ConfigError: load_state_dict() failed on rank {culprit}, and so on all: ValueError"
            )
            assert second.startswith(f"ConfigError: load_state_for() failed on rank {culprit}")
            assert "has shape (5,)" in second


def test_a_layer_that_thaws_has_state_in_commits_and_one_that_freezes_keeps_it(tmp_path: Any) -> None:
    def train(job: trainer.Job, *, frozen_first: bool, steps: int) -> tuple[dict[str, Any], trainer.RemoteOptimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[0].requires_grad_(not frozen_first)
        model[1].requires_grad_(frozen_first)
        trainer.offload(model, job)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=0.1)
        before = optimizer.state_dict()
        model.requires_grad_(True)
        for _ in range(steps):
            model(torch.ones(2, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        job.commit()
        return before, optimizer

    with LocalCluster(2, data_dir=tmp_path) as cluster:
        with trainer.connect(cluster.addresses, rank=0, world_size=1) as job:
            before, optimizer = train(job, frozen_first=True, steps=2)
            assert before["state"] == {}
            expected = optimizer.state_dict()
            assert expected["state"].keys() == {0, 1, 2, 3}
        for server in range(2):
            cluster.restart(server)
        with trainer.connect(cluster.addresses, rank=0, world_size=1) as job:
            restored, _ = train(job, frozen_first=False, steps=1)
            check_state_equal(restored, expected)
