"""What is done to gradients stays done where some of them are dropped, or a call is refused."""

import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

import trainer
from ps import LocalCluster
from tests.models import Residual, batch, loss_of, seeded
from tests.trainer.runs import gathered_values
from tests.trainer.semantics.groups import run_group


def drop(parameter: nn.Parameter) -> None:
    parameter.grad = None


def zero(parameter: nn.Parameter) -> None:
    assert parameter.grad is not None
    parameter.grad.zero_()


def another_backward(model: nn.Module) -> None:
    """Refused where a trainer's gradients were clipped; plain torch has nothing against it."""
    with pytest.raises(trainer.ConfigError, match="after the gradients of this step were clipped"):
        loss_of(model, batch(9)).backward()


@pytest.mark.parametrize(
    "between",
    [lambda model: drop(model.head.bias), lambda model: zero(model.head.bias), None],
    ids=["dropped", "zeroed", "a refused backward"],
)
def test_clipping_stays(cluster: LocalCluster, job_name: str, between: Callable[[nn.Module], None] | None) -> None:
    plain = seeded(Residual)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True)
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(seeded(Residual), job)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)
        for step in range(2):
            for each, its_optimizer, api in ((plain, reference, nn.utils), (model, optimizer, trainer)):
                loss_of(each, batch(step)).backward()
                api.clip_grad_norm_(each.parameters(), 0.1)
                if between is not None:
                    between(each)
                elif each is model:
                    another_backward(model)
                its_optimizer.step()
                its_optimizer.zero_grad()
        for name, values in gathered_values(model).items():
            assert torch.equal(values, plain.get_parameter(name)), name


def test_a_group_is_added_while_a_rank_is_ahead(cluster: LocalCluster, job_name: str) -> None:
    models = [seeded(Residual) for _ in range(2)]

    def train(job: trainer.Job) -> dict[str, torch.Tensor]:
        model = trainer.offload(models[job.rank], job)
        *rest, last, _ = [param for param in model.parameters() if param.numel()]
        optimizer = trainer.RemoteOptimizer(rest, torch.optim.SGD, lr=1e-2)
        for step in range(3):
            if step == 1:
                optimizer.add_param_group({"params": [last], "lr": 0.1})
            loss_of(model, batch(step)).backward()
            # The one gives its word for the step long before the other.
            time.sleep(0.5 * job.rank)
            optimizer.step()
            optimizer.zero_grad()
        return gathered_values(model)

    one, two = run_group(cluster.addresses, job_name, 2, train)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_group_that_is_refused_is_not_added(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(nn.Linear(3, 2), job)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        with pytest.raises(trainer.ConfigError, match="is not offloaded"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
        assert len(optimizer.param_groups) == 1
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
