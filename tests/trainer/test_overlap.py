"""`optimizer.last_backward()`: updates while backward goes on, with the bits of plain torch, whole or not at all."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import trainer
from protos import zero_ps_pb2 as pb
from ps import LocalCluster
from tests.models import Residual, batch, loss_of, seeded
from tests.ps.client import Client
from tests.ranks import run_ranks
from tests.trainer.runs import Deep, gathered_values
from trainer.offload import find

Trained = tuple[nn.Module, trainer.RemoteOptimizer]


@contextmanager
def training(
    cluster: LocalCluster, job: str, make: Callable[[], nn.Module] = Residual, **options: Any
) -> Iterator[Trained]:
    """A model in a job of its own, and its optimizer."""
    with trainer.connect(cluster.addresses, job=job) as connection:
        model = trainer.offload(seeded(make), connection)
        yield model, trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, **{"lr": 1e-2, **options})


def step_of(model: nn.Module, optimizer: Any, step: int, parts: int = 1, *, zero_grad: bool = False) -> torch.Tensor:
    """One step on so many micro-batches; the last loss. zero_grad: as in `last_backward`."""
    for part in range(parts):
        loss = loss_of(model, batch(10 * step + part))
        if part == parts - 1 and isinstance(optimizer, trainer.RemoteOptimizer):
            with optimizer.last_backward(zero_grad=zero_grad):
                loss.backward()
        else:
            loss.backward()
    optimizer.step()
    if zero_grad and not isinstance(optimizer, trainer.RemoteOptimizer):
        optimizer.zero_grad()
    return loss.detach()


def finals(model: nn.Module) -> set[str]:
    """The parameters whose gradients were sent as final in this step."""
    announcement = find(model).announcement
    return {state.name for state in find(model).states if announcement.is_final(state)}


def same(model: nn.Module, plain: nn.Module) -> None:
    for name, values in gathered_values(model).items():
        assert torch.equal(values, plain.get_parameter(name)), name


@pytest.mark.parametrize("servers", [1, 3, 4])
def test_results_are_those_of_plain_torch(servers: int) -> None:
    """Micro-batches, a schedule, groups, a frozen part, a step without the context, gradients that stay."""

    def prepared(make: Callable[..., torch.optim.Optimizer]) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        model = seeded(Residual)
        model.blocks[0].norm.weight.requires_grad_(False)
        return model, *make(model)

    def optimize(model: nn.Module, cls: Callable[..., torch.optim.Optimizer]) -> Any:
        biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
        rest = [p for name, p in model.named_parameters() if not name.endswith("bias") and p.numel()]
        optimizer = cls([{"params": biases, "weight_decay": 0.0}, {"params": rest}])
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)

    plain = prepared(lambda m: optimize(m, lambda groups: torch.optim.AdamW(groups, lr=1e-2, fused=True)))
    with LocalCluster(servers) as cluster, trainer.connect(cluster.addresses) as job:
        model = seeded(Residual)
        model.blocks[0].norm.weight.requires_grad_(False)
        trainer.offload(model, job)
        ours = model, *optimize(model, lambda groups: trainer.RemoteOptimizer(groups, torch.optim.AdamW, lr=1e-2))
        for step in range(5):
            losses = []
            for one, optimizer, schedule in (plain, ours):
                if step == 3:
                    loss = loss_of(one, batch(step))
                    loss.backward()
                    optimizer.step()
                else:
                    loss = step_of(one, optimizer, step, parts=2)
                losses.append(loss)
                schedule.step()
                if step != 1:
                    (one if step == 2 else optimizer).zero_grad()
            assert torch.equal(*losses)
        same(model, plain[0])


def test_a_limited_memory_changes_nothing() -> None:
    runs = []
    for memory, zero_grad in ((None, False), ("3MiB", False), ("3MiB", True)):
        with (
            LocalCluster(1, memory=memory) as cluster,
            training(cluster, "deep", lambda: Deep(16, 256)) as (model, opt),
        ):
            for step in range(4):
                x = torch.randn(4, 256, generator=torch.Generator().manual_seed(step))
                loss = model(x).pow(2).mean()
                with opt.last_backward(zero_grad=zero_grad):
                    loss.backward()
                if step:
                    assert len(finals(model)) == 16
                opt.step()
                opt.zero_grad()
            runs.append(gathered_values(model))
    for run in runs[1:]:
        assert all(torch.equal(runs[0][name], value) for name, value in run.items())


def test_gradients_may_go_as_they_are_used(cluster: LocalCluster, job_name: str) -> None:
    """Steps with and without that, micro-batches, and gradients that stay."""
    plain = seeded(Residual)
    reference = torch.optim.AdamW([p for p in plain.parameters() if p.numel()], lr=1e-2, fused=True)
    with training(cluster, job_name) as (model, optimizer):
        for step in range(8):
            how: dict[str, Any] = {"parts": 1 + step % 2, "zero_grad": step % 4 != 2}
            assert torch.equal(step_of(model, optimizer, step, **how), step_of(plain, reference, step, **how))
            gradients = [parameter.grad is None for parameter in model.parameters() if parameter.numel()]
            assert all(gradients) if how["zero_grad"] else not any(gradients)
            # It has nothing to do.
            if step % 3 and how["zero_grad"]:
                optimizer.zero_grad()
        same(model, plain)


# ---------------------------------------------------------------- when updates run


def test_parameters_are_updated_while_backward_goes_on(job_name: str) -> None:
    with LocalCluster(1) as cluster, training(cluster, job_name) as (model, optimizer):
        reader = Client(cluster.addresses[0], job=job_name, read_only=True)
        step_of(model, optimizer, 0)
        optimizer.zero_grad()
        names = [name for name, param in model.named_parameters() if param.numel()]
        manifest = [find(model).states[names.index(name)].remote.index for name in ("head.weight", "embedding.weight")]
        shape = tuple(model.head.weight.shape)
        seen: list[bytes] = []

        def look(_: torch.Tensor) -> None:
            """Before the embedding's gradient there is, in the middle of the backward."""
            chunk = [pb.ChunkRef(parameter=manifest[0], chunk=0)]
            request = reader.send_pull([], version=2, chunks=chunk, timeout=20)
            seen.append(reader.receive(request, shape[0] * shape[1] * 4))

        handle = model.embedding.weight.register_hook(look)
        loss = loss_of(model, batch(1))
        with optimizer.last_backward():
            loss.backward()
        handle.remove()
        assert len(seen) == 1
        optimizer.step()
        with trainer.gathered(model.head.weight):
            updated = model.head.weight.detach().numpy().tobytes()
        assert seen[0] == updated


def with_a_slow_rank(addresses: list[str], jobs: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    """Four steps in each job, of two trainers, one of which is slow; some of them announce theirs."""
    rank, results = int(os.environ["RANK"]), []
    for job, (slow, early) in jobs.items():
        with trainer.connect(addresses, job=job) as connection:
            model = trainer.offload(seeded(Residual, seed=rank), connection)
            optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)
            for step in range(4):
                if rank == slow:
                    time.sleep(0.1)
                loss = loss_of(model, batch(step).chunk(2)[rank])
                with optimizer.last_backward() if rank in early else nullcontext():
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            results.append(gathered_values(model))
    return results


def test_two_trainers_give_the_same_bits_whoever_is_late_and_whoever_announces(cluster: LocalCluster) -> None:
    jobs = {"plain": (0, []), "first": (0, [0, 1]), "second": (1, [0, 1]), "one": (1, [0])}
    ranks = run_ranks("trainer.test_overlap:with_a_slow_rank", cluster.addresses, 2, jobs=jobs)
    expected = ranks[0][0]
    for values in (*ranks[0], *ranks[1]):
        assert all(torch.equal(values[name], value) for name, value in expected.items())


# ---------------------------------------------------------------- what is learned


class Shared(nn.Module):
    """A layer in two reentrant checkpoints, whose gradient comes in two parts, and one beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(6, 6)
        self.once = nn.Linear(6, 6)
        self.also_once = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.once(x)
        x = checkpoint(self.twice, x, use_reentrant=True)
        return checkpoint(self.twice if self.also_once else torch.tanh, x, use_reentrant=True)


def backward_of(model: nn.Module, optimizer: trainer.RemoteOptimizer | None) -> None:
    loss = model(torch.ones(2, 6)).sum()
    if optimizer is None:
        loss.backward()
        return
    with optimizer.last_backward():
        loss.backward()


def test_a_gradient_that_comes_in_parts_is_never_early(cluster: LocalCluster, job_name: str) -> None:
    with training(cluster, job_name, Shared) as (model, optimizer):
        plain = seeded(Shared)
        reference = torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True)
        for step in range(3):
            for one, steps in ((model, optimizer), (plain, reference)):
                backward_of(one, steps if one is model else None)
                if one is model:
                    assert finals(model) == ({"once.weight", "once.bias"} if step else set())
                steps.step()
                steps.zero_grad()
        same(model, plain)


def test_a_gradient_that_unexpectedly_comes_in_parts_ends_the_training(cluster: LocalCluster, job_name: str) -> None:
    with training(cluster, job_name, Shared) as (model, optimizer):
        model.also_once = False
        for _ in range(2):
            backward_of(model, optimizer)
            optimizer.step()
            optimizer.zero_grad()
        model.also_once = True
        with pytest.raises(trainer.StepHalfDone, match=r"'twice\.\w+' got another gradient .* after one that was sent"):
            backward_of(model, optimizer)
        with pytest.raises(trainer.StepHalfDone, match="close the job and connect again"):
            optimizer.step()


class Detached(nn.Module):
    """A layer whose weight is used apart from its gradient: needed for another one after it has its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(400, 400) / 20)
        self.second = nn.Parameter(torch.randn(400, 400) / 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.first * self.second.detach()[:3]).tanh() @ self.second


def test_what_is_needed_after_its_gradient_is_never_early(cluster: LocalCluster, job_name: str) -> None:
    x = torch.randn(3, 400)
    with training(cluster, job_name, Detached) as (model, optimizer):
        plain = seeded(Detached)
        reference = torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True)
        for step in range(3):
            loss = model(x).sum()
            with optimizer.last_backward():
                loss.backward()
            assert finals(model) <= ({"first"} if step else set())
            optimizer.step()
            optimizer.zero_grad()
            plain(x).sum().backward()
            reference.step()
            reference.zero_grad()
        same(model, plain)


def test_two_backwards_in_one_context_are_learned_too(cluster: LocalCluster, job_name: str) -> None:
    with training(cluster, job_name) as (model, optimizer):
        plain = seeded(Residual)
        reference = torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True)
        for _ in range(3):
            with optimizer.last_backward():
                for part in range(2):
                    loss_of(model, batch(part)).backward()
            assert not finals(model)
            optimizer.step()
            optimizer.zero_grad()
            for part in range(2):
                loss_of(plain, batch(part)).backward()
            reference.step()
            reference.zero_grad()
        same(model, plain)


# ---------------------------------------------------------------- what is refused


def test_nothing_may_change_the_step_between_its_announcement_and_its_end(cluster: LocalCluster, job_name: str) -> None:
    with training(cluster, job_name) as (model, optimizer):
        plain = seeded(Residual)
        reference = torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True)
        for step in range(2):
            step_of(plain, reference, step)
            reference.zero_grad()
        step_of(model, optimizer, 0)
        optimizer.zero_grad()
        loss = loss_of(model, batch(10))
        with optimizer.last_backward():
            loss.backward()
        job = find(model).job

        def enter(context: Any) -> None:
            with context:
                raise AssertionError

        group = optimizer.param_groups[0]
        group["lr"] = 0.5
        with pytest.raises(trainer.ConfigError, match=r"'lr' of group 0 was 0\.01 at optimizer\.last_backward\(\)"):
            optimizer.step()
        group["lr"] = 1e-2
        refused: list[Callable[[], object]] = [
            lambda: trainer.clip_grad_norm_(model.parameters(), 1.0),
            lambda: trainer.clip_grad_value_(model.parameters(), 1.0),
            optimizer.zero_grad,
            optimizer.state_dict,
            lambda: optimizer.load_state_dict(reference.state_dict()),
            lambda: trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW),
            lambda: loss_of(model, batch(9)).backward(),
            lambda: optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]}),
            job.commit,
            lambda: enter(optimizer.last_backward()),
            lambda: enter(trainer.gathered(model.head, modify=True)),
            lambda: model.head.weight.detach().copy_(plain.head.weight),
        ]
        for number, action in enumerate(refused):
            with pytest.raises(trainer.ConfigError, match=r"optimizer\.step\(\) first"):
                action()
                raise AssertionError(number)
        trainer.release(model)
        with pytest.raises(trainer.ConfigError, match=r"using parameter '[\w.]+' between .* optimizer\.step\(\) first"):
            model(batch(1))
        optimizer.step()
        same(model, plain)


def test_gradients_that_the_module_drops_after_the_announcement(cluster: LocalCluster, job_name: str) -> None:
    """Nothing was final in the first one, so it is as if nothing had been announced; later the step is half done."""
    with training(cluster, job_name) as (model, optimizer):
        for step in range(2):
            with optimizer.last_backward():
                loss_of(model, batch(step)).backward()
            model.zero_grad()
            if step == 0:
                optimizer.step()
                assert gathered_values(model).keys()
                continue
            with pytest.raises(trainer.StepHalfDone, match="gradients were dropped, as by model.zero_grad"):
                optimizer.step()
            with pytest.raises(trainer.StepHalfDone):
                optimizer.step()


def test_a_clipped_gradient_is_not_followed_by_a_last_backward(cluster: LocalCluster, job_name: str) -> None:
    with training(cluster, job_name) as (model, optimizer):
        loss_of(model, batch(0)).backward()
        trainer.clip_grad_norm_(model.parameters(), 1.0)
        loss = loss_of(model, batch(1))
        with pytest.raises(trainer.ConfigError, match="clipped or unscaled already"), optimizer.last_backward():
            loss.backward()
        optimizer.zero_grad()
        step_of(model, optimizer, 0)


# ---------------------------------------------------------------- what breaks off


def interrupted(model: nn.Module, optimizer: trainer.RemoteOptimizer, error: BaseException) -> None:
    """A backward that ends with an error after the gradients of the head and the last block."""

    def fail(_: torch.Tensor) -> None:
        raise error

    handle = model.blocks[0].down.weight.register_hook(fail)
    loss = loss_of(model, batch(3))
    try:
        with optimizer.last_backward():
            loss.backward()
    finally:
        handle.remove()


def test_a_backward_that_fails_before_anything_was_final_can_be_repeated(cluster: LocalCluster, job_name: str) -> None:
    with training(cluster, job_name) as (model, optimizer):
        plain = seeded(Residual)
        reference = torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True)
        with pytest.raises(ArithmeticError):
            interrupted(model, optimizer, ArithmeticError("no"))
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = 0.02
        for step in range(2):
            step_of(model, optimizer, step)
            optimizer.zero_grad()
            step_of(plain, reference, step)
            reference.zero_grad()
        same(model, plain)


@pytest.mark.parametrize("error", [ArithmeticError("no"), KeyboardInterrupt()])
def test_a_backward_that_fails_later_sends_the_job_back_to_its_last_commit(
    tmp_path: Path, error: BaseException
) -> None:
    with LocalCluster(2, data_dir=tmp_path) as cluster:
        with training(cluster, "j") as (model, optimizer):
            step_of(model, optimizer, 0)
            optimizer.zero_grad()
            job = find(model).job
            job.commit()
            kept = gathered_values(model)
            with pytest.raises(type(error)):
                interrupted(model, optimizer, error)
            for action in (optimizer.step, optimizer.zero_grad, job.commit, lambda: step_of(model, optimizer, 1)):
                with pytest.raises(trainer.StepHalfDone, match=r"step 1 of job 'j' is half done: .*the last commit"):
                    action()
        with training(cluster, "j") as (model, optimizer):
            assert all(torch.equal(kept[name], value) for name, value in gathered_values(model).items())
            step_of(model, optimizer, 1)


def test_a_trainer_that_dies_in_the_middle_leaves_no_half_step(tmp_path: Path) -> None:
    with LocalCluster(2, data_dir=tmp_path, lease=2) as cluster:
        with pytest.raises(AssertionError, match="rank 0"):
            run_ranks("trainer.test_overlap:dies_in_backward", cluster.addresses, 1)
        with training(cluster, "dying") as (model, optimizer):
            assert find(model).job.step == 1
            plain = seeded(Residual)
            reference = torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True)
            step_of(plain, reference, 0)
            same(model, plain)
            step_of(model, optimizer, 1)


def dies_in_backward(addresses: list[str]) -> None:
    with trainer.connect(addresses, job="dying") as job:
        model = trainer.offload(seeded(Residual), job)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)
        step_of(model, optimizer, 0)
        optimizer.zero_grad()
        job.commit()

        def die(_: torch.Tensor) -> None:
            job.transfer.flush()
            os._exit(1)

        model.embedding.weight.register_hook(die)
        step_of(model, optimizer, 1)


def test_a_commit_that_goes_on_has_the_state_from_before_the_backward(tmp_path: Path) -> None:
    with LocalCluster(2, data_dir=tmp_path) as cluster:
        with training(cluster, "j", lambda: Deep(12, 400)) as (model, optimizer):
            job = find(model).job
            for _ in range(4):
                kept = gathered_values(model)
                commit = job.commit(wait=False)
                loss = model(torch.ones(2, 400)).sum()
                with optimizer.last_backward():
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                commit.wait()
        for number in range(2):
            cluster.restart(number)
        with training(cluster, "j", lambda: Deep(12, 400)) as (model, _):
            assert all(torch.equal(kept[name], value) for name, value in gathered_values(model).items())


def test_what_looks_at_all_gradients_has_no_last_backward(cluster: LocalCluster, job_name: str) -> None:
    with training(cluster, job_name, skip_nonfinite=True) as (model, optimizer):
        with pytest.raises(trainer.ConfigError, match="skip_nonfinite=True"):
            step_of(model, optimizer, 0)
        loss_of(model, batch(0)).backward()
        optimizer.step()


def test_scaled_gradients_are_refused_after_an_announcement(cluster: LocalCluster, job_name: str) -> None:
    with training(cluster, job_name) as (model, optimizer):
        scaler = torch.amp.GradScaler("cpu")
        with optimizer.last_backward():
            scaler.scale(loss_of(model, batch(0))).backward()
        with pytest.raises(trainer.ConfigError, match=r"between optimizer\.last_backward\(\) and"):
            scaler.step(optimizer)
