"""When gradients are there, and when they are gone."""

from typing import Any

import pytest
import torch
from torch import nn

import trainer
from ps import LocalCluster
from tests.trainer.lifecycle.comparing import same
from tests.trainer.lifecycle.test_backward import Mlp


@pytest.mark.parametrize("how", ["optimizer", "module", "param", "before", "forgotten"])
def test_gradients_are_dropped_and_kept_as_in_torch(cluster: LocalCluster, job_name: str, how: str) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        present = []
        for number in range(5):
            if how == "before":
                optimizer.zero_grad()
            model(torch.randn(2, 5)).square().mean().backward()
            present.append([p.grad is None for p in model.parameters()])
            if how == "param" and number == 2:
                model.layers[2].weight.grad = None
            optimizer.step()
            match how:
                case "optimizer":
                    optimizer.zero_grad()
                case "module":
                    model.zero_grad()
                case "param":
                    for param in model.parameters():
                        param.grad = None
            present.append([p.grad is None for p in model.parameters()])
        return present

    same(cluster.addresses, job_name, Mlp, run)


def test_a_gradient_whose_values_are_wanted_says_where_they_are(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(Mlp(), job)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        model(torch.randn(2, 5)).sum().backward()
        weight = model.layers[0].weight
        assert weight.grad is not None and weight.grad.shape == weight.shape
        for use in (weight.grad.norm, lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)):
            with pytest.raises(trainer.ReleasedParameterError, match=r"'layers\.0\.weight' is on the servers"):
                use()
        weight.grad = torch.zeros(8, 5)
        with pytest.raises(trainer.ConfigError, match=r"'layers\.0\.weight' was assigned"):
            optimizer.step()
