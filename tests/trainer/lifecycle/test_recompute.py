"""Recomputation in backward, and passes that do not come to their end."""

import contextlib
import gc
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import trainer
from ps import LocalCluster
from tests.trainer.lifecycle.comparing import nothing_gathered, same, step


class Checkpointed(nn.Module):
    """Recomputes its layers in backward, in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)) for _ in range(3)])
        self.how = how
        self.fail = False
        self.runs = 0

    def layer(self, index: int, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        if self.fail and self.runs > 3:
            raise ArithmeticError("in recompute")
        return torch.tanh(self.layers[index](x))

    def both(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(2, checkpoint(self.layer, 1, x, use_reentrant=False))

    def functional(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.layers[1][0].weight).tanh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs = 0
        match self.how:
            case "nested":
                return checkpoint(self.both, self.layer(0, x), use_reentrant=False)
            case "functional":
                return checkpoint(self.functional, self.layer(0, x), use_reentrant=False)
            case "none":
                for index in range(3):
                    x = self.layer(index, x)
                return x
            case "no early stop":
                from torch.utils.checkpoint import set_checkpoint_early_stop

                with set_checkpoint_early_stop(False):
                    for index in range(3):
                        x = checkpoint(self.layer, index, x, use_reentrant=False)
                return x
        for index in range(3):
            x = checkpoint(self.layer, index, x, use_reentrant=self.how == "reentrant")
        return x


@pytest.mark.parametrize("how", ["reentrant", "early stop", "no early stop", "nested", "functional"])
def test_activation_checkpointing(cluster: LocalCluster, job_name: str, how: str) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(3):
            model(torch.randn(2, 5, requires_grad=True)).square().sum().backward()
            step(optimizer)

    same(cluster.addresses, job_name, lambda: Checkpointed(how), run)


def test_checkpointing_still_frees_activations(cluster: LocalCluster, job_name: str) -> None:
    """Our hooks pass on to the checkpoint's what is not a parameter."""

    def kept(how: str) -> int:
        """How many tensors of the activations' shape, which nothing else has, a graph keeps."""
        model.how = how
        out = model(torch.randn(17, 5, requires_grad=True))
        gc.collect()
        count = sum(type(found) is torch.Tensor and found.shape == (17, 5) for found in gc.get_objects())
        out.sum().backward()
        return count

    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(Checkpointed("none"), job)
        # Each block has three activations, of which it keeps only its input.
        assert kept("none") - kept("early stop") >= 3


@pytest.mark.parametrize("how", ["reentrant", "early stop", "nested"])
def test_an_exception_in_recompute_and_a_retry(cluster: LocalCluster, job_name: str, how: str) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        model.fail = True
        out = model(torch.randn(2, 5, requires_grad=True))
        with pytest.raises(ArithmeticError):
            out.sum().backward()
        model.fail = False
        del out
        optimizer.zero_grad()
        losses = []
        for _ in range(2):
            loss = model(torch.randn(2, 5, requires_grad=True)).square().sum()
            loss.backward()
            step(optimizer)
            losses.append(loss.item())
        return losses

    same(cluster.addresses, job_name, lambda: Checkpointed(how), run)


class Failing(nn.Module):
    """Fails on demand, in forward or in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 5), nn.Linear(5, 5)
        self.fail_in = ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if self.fail_in == "forward":
            raise ArithmeticError("in forward")
        if self.fail_in == "backward":
            x.register_hook(self._fail)
        return self.last(x)

    @staticmethod
    def _fail(grad: torch.Tensor) -> None:
        raise ArithmeticError("in backward")


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_leaves_no_stale_state(cluster: LocalCluster, job_name: str, where: str) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        losses = []
        for attempt in range(4):
            model.fail_in = where if attempt % 2 == 0 else ""
            try:
                one(model, losses)
            except ArithmeticError:
                optimizer.zero_grad()
                if isinstance(optimizer, trainer.RemoteOptimizer):
                    nothing_gathered(model)
                continue
            step(optimizer)
        return losses

    def one(model: nn.Module, losses: list[float]) -> None:
        loss = model(torch.randn(2, 5)).square().sum()
        loss.backward()
        losses.append(loss.item())

    same(cluster.addresses, job_name, Failing, run)


def test_an_interrupted_forward_is_cleaned_up_by_zero_grad(cluster: LocalCluster, job_name: str) -> None:
    class Interrupted(Failing):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.fail_in == "interrupt":
                raise KeyboardInterrupt
            return super().forward(x)

    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for attempt in range(4):
            model[1].fail_in = "interrupt" if attempt % 2 == 0 else ""
            with contextlib.suppress(KeyboardInterrupt):
                model(torch.randn(2, 5)).square().sum().backward()
                optimizer.step()
            optimizer.zero_grad()
            if isinstance(optimizer, trainer.RemoteOptimizer):
                nothing_gathered(model)

    same(cluster.addresses, job_name, lambda: nn.Sequential(nn.Linear(5, 5), Interrupted()), run)
