"""`OffloadConfig(max_staleness=k)`: trainers up to k steps ahead of updates, and never more.

Servers with late updates put each update off until no trainer can go on without it. Then every step computes with
the weights of k steps before, which plain torch can do as well: that is what results are compared with.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trainer
from ps import LocalCluster
from tests.models import Residual, batch, loss_of, seeded
from tests.ranks import run_ranks
from tests.trainer.runs import Deep, gathered_values
from tests.trainer.semantics.test_failed_step import lose_spilled_state

AdamW = torch.optim.AdamW


class Delayed:
    """Plain training in which step t computes its gradients with the weights from before step t - k."""

    def __init__(self, make: Callable[[], nn.Module], staleness: int, **options: Any) -> None:
        self.model, self._worker = seeded(make), seeded(make)
        self.optimizer = AdamW([p for p in self.model.parameters() if p.numel()], fused=True, **options)
        self._staleness = staleness
        self._history = [self._values()]
        self.steps = 0
        # Gradients that stay from step to step have to be updated with before more can be added.
        self._reached = 0

    def _values(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    def backward(self, *losses: Callable[[nn.Module], torch.Tensor]) -> list[float]:
        """Of each trainer's loss; gradients are their mean."""
        old = self._history[max(self._reached, self.steps - self._staleness)]
        with torch.no_grad():
            for param, value in zip(self._worker.parameters(), old, strict=True):
                param.copy_(value)
        totals, values = [], []
        for loss in losses:
            value = loss(self._worker)
            value.backward()
            values.append(value.item())
            totals.append([p.grad for p in self._worker.parameters()])
            self._worker.zero_grad()
        for param, *gradients in zip(self.model.parameters(), *totals, strict=True):
            if gradients[0] is not None:
                mean = sum(gradients[1:], gradients[0]) / len(gradients)
                param.grad = mean if param.grad is None else param.grad + mean
        return values

    def everything_is_updated(self) -> None:
        self._reached = self.steps

    def step(self, scaler: torch.amp.GradScaler | None = None) -> None:
        if scaler is not None:
            scaler.unscale_(self.optimizer)
            scaler.step(self.optimizer)
            if not all(param.grad.isfinite().all() for param in self.optimizer.param_groups[0]["params"]):
                return
        else:
            self.optimizer.step()
        self._history.append(self._values())
        self.steps += 1


@pytest.fixture(scope="module")
def late() -> Iterator[LocalCluster]:
    with LocalCluster(2, flags=["--late-updates"]) as cluster:
        yield cluster


@contextmanager
def training(
    cluster: LocalCluster, job: str, staleness: int, make: Callable[[], nn.Module] = Residual, **options: Any
) -> Iterator[tuple[trainer.Job, nn.Module, trainer.RemoteOptimizer]]:
    config = trainer.OffloadConfig(max_staleness=staleness, param_persistence_threshold=50)
    with trainer.connect(cluster.addresses, job=job, timeout=60) as connection:
        model = trainer.offload(seeded(make), connection, config)
        yield connection, model, trainer.RemoteOptimizer(model.parameters(), AdamW, **{"lr": 1e-2, **options})


def same(model: nn.Module, plain: nn.Module) -> None:
    for name, values in gathered_values(model).items():
        assert torch.equal(values, plain.get_parameter(name)), name


@pytest.mark.parametrize("announced", [False, True], ids=["plain", "announced"])
@pytest.mark.parametrize("staleness", [1, 2, 4])
def test_late_updates_are_delayed_gradient_descent(
    late: LocalCluster, job_name: str, staleness: int, announced: bool
) -> None:
    plain = Delayed(Residual, staleness, lr=1e-2)
    with training(late, job_name, staleness) as (_, model, optimizer):
        for step in range(9):
            loss = loss_of(model, batch(step))
            with optimizer.last_backward(zero_grad=True) if announced else nullcontext():
                loss.backward()
            optimizer.step()
            if not announced:
                optimizer.zero_grad()
            assert [loss.item()] == plain.backward(lambda m, step=step: loss_of(m, batch(step)))
            plain.step()
            plain.optimizer.zero_grad()
        same(model, plain.model)


def test_everything_that_a_loop_may_do(late: LocalCluster, job_name: str) -> None:
    """Micro-batches, clipping, a schedule, gradients that stay, zeros, announced steps."""
    plain = Delayed(Residual, 2, lr=1e-2)
    with training(late, job_name, 2) as (_, model, optimizer):
        schedules = [torch.optim.lr_scheduler.ExponentialLR(each, 0.8) for each in (plain.optimizer, optimizer)]
        for step in range(14):
            for part in range(1 + step % 2):
                loss = loss_of(model, batch(10 * step + part))
                with optimizer.last_backward() if step % 5 == 4 and part == step % 2 else nullcontext():
                    loss.backward()
                (expected,) = plain.backward(lambda m, step=step, part=part: loss_of(m, batch(10 * step + part)))
                torch.testing.assert_close(loss.item(), expected, rtol=1e-5, atol=0)
                if step % 4 == 0 and step:
                    plain.everything_is_updated()
            if step % 5 in (1, 2):
                norm = trainer.clip_grad_norm_(model.parameters(), 0.5)
                params = [p for p in plain.model.parameters() if p.numel()]
                torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(params, 0.5))
            optimizer.step()
            plain.step()
            if step % 4 != 3:
                optimizer.zero_grad(set_to_none=step % 3 != 0)
                plain.optimizer.zero_grad(set_to_none=step % 3 != 0)
            for schedule in schedules:
                schedule.step()
        for name, values in gathered_values(model).items():
            torch.testing.assert_close(values, plain.model.get_parameter(name), rtol=1e-4, atol=1e-6)


def test_two_trainers(late: LocalCluster, job_name: str) -> None:
    ranks = run_ranks("trainer.runs:delayed_steps", late.addresses, 2, job=job_name, steps=6, staleness=2)
    plain = Delayed(Residual, 2, lr=1e-2)
    for step in range(6):
        halves = batch(step).chunk(2)
        losses = plain.backward(*(lambda m, half=half: loss_of(m, half) for half in halves))
        assert losses == [rank["losses"][step] for rank in ranks]
        plain.step()
        plain.optimizer.zero_grad()
    for rank in ranks:
        for name, values in rank["params"].items():
            assert torch.equal(values, plain.model.get_parameter(name)), name


def test_state_on_disk(tmp_path: Path) -> None:
    """Sums of gradients of several steps are spilled beside each other."""
    with LocalCluster(1, data_dir=tmp_path, memory="3MiB", flags=["--late-updates"]) as cluster:
        plain = Delayed(lambda: Deep(16, 256), 2, lr=1e-2)
        with training(cluster, "deep", 2, lambda: Deep(16, 256)) as (job, model, optimizer):
            for step in range(6):
                x = torch.randn(4, 256, generator=torch.Generator().manual_seed(step))
                model(x).pow(2).mean().backward()
                plain.backward(lambda m, x=x: m(x).pow(2).mean())
                optimizer.step()
                plain.step()
                optimizer.zero_grad()
                plain.optimizer.zero_grad()
            same(model, plain.model)
            job.commit()
            assert cluster.log(0).count("committed") == 1
        assert any(folder.name.startswith("gradient") for folder in tmp_path.glob("shard-0/deep/working/*/*"))


def test_what_is_no_training_sees_the_last_step(late: LocalCluster, job_name: str) -> None:
    """Reads of parameters, evaluations, optimizer state, averages, new groups, commits: they wait for all updates."""
    plain = Delayed(Residual, 3, lr=1e-2)
    with training(late, job_name, 3, ema_decay=0.9) as (job, model, optimizer):
        looks: list[Callable[[], Any]] = [
            lambda: same(model, plain.model),
            lambda: _evaluate(model, plain.model),
            lambda: _compare_state(model, optimizer, plain),
            lambda: _average_is_there(model),
            job.commit,
            lambda: job.commit(wait=False).wait(),
            lambda: optimizer.add_param_group({"params": [nn.Parameter(torch.empty(0))]}),
        ]
        for step in range(3 * len(looks)):
            loss = loss_of(model, batch(step))
            loss.backward()
            assert plain.backward(lambda m, s=step: loss_of(m, batch(s))) == [loss.item()], step
            optimizer.step()
            optimizer.zero_grad()
            plain.step()
            plain.optimizer.zero_grad()
            if step % 3 == 2:
                looks[step // 3]()
                plain.everything_is_updated()


def test_a_look_between_forward_and_backward_disturbs_neither(late: LocalCluster, job_name: str) -> None:
    plain = Delayed(Residual, 2, lr=1e-2)
    with training(late, job_name, 2) as (_, model, optimizer):
        for step in range(4):
            loss = loss_of(model, batch(step))
            if step == 3:
                same(model, plain.model)
                _evaluate(model, plain.model)
            loss.backward()
            plain.backward(lambda m, s=step: loss_of(m, batch(s)))
            optimizer.step()
            optimizer.zero_grad()
            plain.step()
            plain.optimizer.zero_grad()
        for name, values in gathered_values(model).items():
            torch.testing.assert_close(values, plain.model.get_parameter(name), rtol=0.1, atol=0.02)


def _evaluate(model: nn.Module, plain: nn.Module) -> None:
    with torch.no_grad():
        assert loss_of(model, batch(99)).item() == loss_of(plain, batch(99)).item()


def _compare_state(model: nn.Module, optimizer: trainer.RemoteOptimizer, plain: Delayed) -> None:
    expected = {name: plain.optimizer.state[param] for name, param in plain.model.named_parameters() if param.numel()}
    state = dict(optimizer.state_items())
    assert state.keys() == expected.keys()
    for name, values in expected.items():
        assert all(torch.equal(value, state[name][array]) for array, value in values.items()), name


def _average_is_there(model: nn.Module) -> None:
    with trainer.ema_weights(model), torch.no_grad():
        loss_of(model, batch(99))


def test_loss_scaling_leaves_steps_out(late: LocalCluster, job_name: str) -> None:
    """A scaler looks at the gradients of the present step, whatever updates are still to come."""
    plain = Delayed(Residual, 2, lr=1e-2)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-8) for _ in range(2)]
    with training(late, job_name, 2) as (job, model, optimizer):
        for number in range(25):
            loss = loss_of(model, batch(number))
            scalers[0].scale(loss).backward()
            plain.backward(lambda m, n=number: scalers[1].scale(loss_of(m, batch(n))))
            assert scalers[0].get_scale() == scalers[1].get_scale()
            scalers[0].step(optimizer)
            scalers[0].update()
            optimizer.zero_grad()
            plain.step(scalers[1])
            scalers[1].update()
            plain.optimizer.zero_grad()
            assert job.step == plain.steps
        assert optimizer.skipped_steps
        same(model, plain.model)


def test_an_update_that_fails_fails_everywhere(tmp_path: Path) -> None:
    """Also those of later steps, which trainers have asked for already; going on begins at the last commit."""
    with LocalCluster(2, data_dir=tmp_path, memory="3MiB", flags=["--late-updates"]) as cluster:
        with training(cluster, "default", 2, lambda: Deep(16, 256)) as (job, model, optimizer):
            for step in range(2):
                _step_of_deep(model, optimizer, step)
            job.commit()
            for step in range(2, 4):
                _step_of_deep(model, optimizer, step)
            assert lose_spilled_state(cluster.data_dirs[1]) > 0
            # Reading ahead may find out before the update does.
            with pytest.raises(trainer.ServerFailure, match=r"step \d failed on shard 1|cannot read .* back from"):
                for step in range(4, 9):
                    _step_of_deep(model, optimizer, step)
            with pytest.raises(trainer.ServerFailure):
                job.commit()
        with training(cluster, "default", 2, lambda: Deep(16, 256)) as (job, model, optimizer):
            assert job.step == 2
            assert {int(values["step"]) for _, values in optimizer.state_items()} == {2}
            _step_of_deep(model, optimizer, 2)
            gathered_values(model)


def _step_of_deep(model: nn.Module, optimizer: trainer.RemoteOptimizer, step: int) -> None:
    model(torch.randn(4, 256, generator=torch.Generator().manual_seed(step))).pow(2).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_servers_that_die_go_on_from_the_last_commit(tmp_path: Path) -> None:
    plain = Delayed(Residual, 2, lr=1e-2)
    with LocalCluster(2, data_dir=tmp_path, flags=["--late-updates"]) as cluster:
        with training(cluster, "default", 2) as (job, model, optimizer):
            for step in range(6):
                loss_of(model, batch(step)).backward()
                optimizer.step()
                optimizer.zero_grad()
                if step == 3:
                    job.commit()
            cluster.kill(0)
        cluster.restart(0)
        for step in range(8):
            if step == 4:
                plain.everything_is_updated()
            plain.backward(lambda m, s=step: loss_of(m, batch(s)))
            plain.step()
            plain.optimizer.zero_grad()
        with training(cluster, "default", 2) as (job, model, optimizer):
            assert job.step == 4
            for step in range(4, 8):
                loss_of(model, batch(step)).backward()
                optimizer.step()
                optimizer.zero_grad()
            same(model, plain.model)


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_updates_that_are_not_put_off_converge(cluster: LocalCluster, job_name: str, staleness: int) -> None:
    with training(cluster, job_name, staleness) as (_, model, optimizer):
        first = loss_of(model, batch(0)).item()
        for _ in range(30):
            loss = loss_of(model, batch(0))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert loss.item() < first / 2


def test_rows_of_tables_may_be_behind_too(late: LocalCluster, job_name: str) -> None:
    config = trainer.OffloadConfig(max_staleness=2, sparse_rows=True)
    plain = Delayed(Residual, 2, lr=1e-2)
    with trainer.connect(late.addresses, job=job_name, timeout=60) as job:
        model = trainer.offload(seeded(Residual), job, config)
        optimizer = trainer.RemoteOptimizer(model.parameters(), AdamW, lr=1e-2)
        for step in range(5):
            loss = loss_of(model, batch(step))
            loss.backward()
            assert plain.backward(lambda m, s=step: loss_of(m, batch(s))) == [loss.item()]
            optimizer.step()
            optimizer.zero_grad()
            plain.step()
            plain.optimizer.zero_grad()
        same(model, plain.model)


@pytest.mark.parametrize("wrong", [-1, 65, 1.0, True, None])
def test_only_a_small_number_of_steps_makes_sense(wrong: object) -> None:
    with pytest.raises(trainer.ConfigError, match="whole number from 0 to 64"):
        trainer.OffloadConfig(max_staleness=wrong)


def test_not_in_a_group() -> None:
    with pytest.raises(trainer.ConfigError, match="does not go with mode='group'"):
        trainer.OffloadConfig(max_staleness=1, mode="group")


def test_recovery_in_place_begins_with_all_updates(tmp_path: Path) -> None:
    plain = Delayed(Residual, 2, lr=1e-2)
    for step in range(7):
        if step == 3:
            plain.everything_is_updated()
        plain.backward(lambda m, s=step: loss_of(m, batch(s)))
        plain.step()
        plain.optimizer.zero_grad()
    with (
        LocalCluster(2, data_dir=tmp_path, flags=["--late-updates"]) as cluster,
        training(cluster, "default", 2) as (job, model, optimizer),
    ):
        killed = False
        while job.step < 7:
            if job.step == 5 and not killed:
                cluster.kill(0)
                cluster.restart(0)
                assert job.recover() == 3
                killed = True
            loss_of(model, batch(job.step)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if job.step == 3 and not killed:
                job.commit()
        same(model, plain.model)
