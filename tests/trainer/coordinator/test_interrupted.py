"""Iterations that do not go as they always do: results stay right, and the trace survives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import trainer
from ps import LocalCluster
from tests.trainer.coordinator.observing import Observer, SlowLinks
from tests.trainer.coordinator.test_ahead import Counter
from tests.trainer.lifecycle.comparing import nothing_gathered, same, step
from tests.trainer.runs import gathered_values
from trainer.offload import find
from trainer.parameter import offloaded

WIDTH = 16


class Raises(nn.Module):
    """Raises where it is told to, in the middle of a forward or of a backward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(10)])
        self.own = nn.Parameter(torch.ones(WIDTH))
        self.forward_error: BaseException | None = None
        self.backward_error: BaseException | None = None

    def _in_backward(self, gradient: torch.Tensor) -> torch.Tensor:
        error, self.backward_error = self.backward_error, None
        if error is not None:
            raise error
        return gradient

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            x = torch.tanh(layer(x * self.own))
            if index == 5:
                error, self.forward_error = self.forward_error, None
                if error is not None:
                    raise error
                if x.requires_grad:
                    x.register_hook(self._in_backward)
        return x


Interruption = Callable[[Any, torch.optim.Optimizer], Any]


def _loss(model: Any, rows: int = 3) -> torch.Tensor:
    return model(torch.randn(rows, WIDTH)).square().sum()


def error_in_forward(model: Any, optimizer: torch.optim.Optimizer) -> Any:
    model.forward_error = ValueError("as asked")
    with pytest.raises(ValueError, match="as asked"):
        _loss(model)


def interrupt_in_forward(model: Any, optimizer: torch.optim.Optimizer) -> Any:
    model.forward_error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        _loss(model)
    optimizer.zero_grad()


def interrupt_in_forward_and_on(model: Any, optimizer: torch.optim.Optimizer) -> Any:
    """The next thing is a forward."""
    model.forward_error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        _loss(model)
    with torch.no_grad():
        return _loss(model)


def error_in_backward(model: Any, optimizer: torch.optim.Optimizer) -> Any:
    model.backward_error = ValueError("as asked")
    with pytest.raises(ValueError, match="as asked"):
        _loss(model).backward()
    optimizer.zero_grad()


def error_in_backward_and_again(model: Any, optimizer: torch.optim.Optimizer) -> Any:
    """The next thing is the same backward."""
    loss = _loss(model)
    model.backward_error = ValueError("as asked")
    with pytest.raises(ValueError, match="as asked"):
        loss.backward(retain_graph=True)
    model.zero_grad()
    loss.backward()
    step(optimizer)


def interrupt_in_backward(model: Any, optimizer: torch.optim.Optimizer) -> Any:
    model.backward_error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        _loss(model).backward()
    optimizer.zero_grad()


def evaluation_between(model: Any, optimizer: torch.optim.Optimizer) -> Any:
    loss = _loss(model)
    model.eval()
    with torch.no_grad():
        value = _loss(model, 5)
    model.train()
    loss.backward()
    step(optimizer)
    return value


def two_forwards(model: Any, optimizer: torch.optim.Optimizer) -> Any:
    loss = _loss(model) + _loss(model)
    loss.backward()
    step(optimizer)
    return loss


def two_backwards_in_the_other_order(model: Any, optimizer: torch.optim.Optimizer) -> Any:
    first, second = _loss(model), _loss(model)
    first.backward()
    second.backward()
    step(optimizer)


def forward_without_backward(model: Any, optimizer: torch.optim.Optimizer) -> Any:
    return _loss(model)


def forward_that_is_dropped_after_the_step(model: Any, optimizer: torch.optim.Optimizer) -> Any:
    loss = _loss(model)
    optimizer.step()
    return loss


def zero_grad_between(model: Any, optimizer: torch.optim.Optimizer) -> Any:
    loss = _loss(model)
    optimizer.zero_grad()
    model.zero_grad()
    loss.backward()
    step(optimizer)


def step_without_gradients(model: Any, optimizer: torch.optim.Optimizer) -> Any:
    step(optimizer)


def accumulation(model: Any, optimizer: torch.optim.Optimizer) -> Any:
    for rows in (3, 2, 3):
        _loss(model, rows).backward()
    step(optimizer)


def retained_graph(model: Any, optimizer: torch.optim.Optimizer) -> Any:
    loss = _loss(model)
    loss.backward(retain_graph=True)
    loss.backward()
    step(optimizer)


def edit(model: Any, optimizer: torch.optim.Optimizer) -> Any:
    with trainer.gathered(model, modify=True), torch.no_grad():
        model.layers[3].weight.mul_(0.5)


def edit_between(model: Any, optimizer: torch.optim.Optimizer) -> Any:
    """What is edited is not needed by the backward; what is, is an error of its own."""
    loss = _loss(model)
    with trainer.gathered(model.layers[9].bias, modify=True), torch.no_grad():
        model.layers[9].bias.add_(0.5)
    loss.backward()
    step(optimizer)


def look_between(model: Any, optimizer: torch.optim.Optimizer) -> Any:
    loss = _loss(model)
    with trainer.gathered(model):
        total = sum(p.detach().sum() for p in model.parameters())
    loss.backward()
    step(optimizer)
    return total


def load(model: Any, optimizer: torch.optim.Optimizer) -> Any:
    model.load_state_dict({name: value * 0.9 for name, value in gathered_values(model).items()})


def load_between(model: Any, optimizer: torch.optim.Optimizer) -> Any:
    """The loss was computed with what is gone; so it is dropped."""
    loss = _loss(model)
    load(model, optimizer)
    return loss


def convert(model: Any, optimizer: torch.optim.Optimizer) -> Any:
    model.to(torch.float64)
    with torch.no_grad():
        value = model(torch.randn(2, WIDTH, dtype=torch.float64))
    model.to(torch.float32)
    return value.shape


def release(model: Any, optimizer: torch.optim.Optimizer) -> Any:
    loss = _loss(model)
    if find(model) is not None:
        trainer.release(model)
        nothing_gathered(model)
    loss.backward()
    step(optimizer)


INTERRUPTIONS = [
    error_in_forward,
    interrupt_in_forward,
    interrupt_in_forward_and_on,
    error_in_backward,
    error_in_backward_and_again,
    interrupt_in_backward,
    evaluation_between,
    two_forwards,
    two_backwards_in_the_other_order,
    forward_without_backward,
    forward_that_is_dropped_after_the_step,
    zero_grad_between,
    step_without_gradients,
    accumulation,
    retained_graph,
    edit,
    edit_between,
    look_between,
    load,
    load_between,
    convert,
    release,
]


def _train(model: Any, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    loss = _loss(model)
    loss.backward()
    step(optimizer)
    return loss.detach()


@pytest.mark.parametrize("interruption", INTERRUPTIONS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("roomy", [True, False], ids=["roomy", "tight"])
def test_results_are_right_and_the_trace_survives(
    cluster: LocalCluster, job_name: str, interruption: Interruption, roomy: bool
) -> None:
    # Some convert it to float64.
    whole = 8 * (10 * (WIDTH * WIDTH + WIDTH) + WIDTH)
    limit = None if roomy or "gathered" in interruption.__code__.co_names else 5 * 4 * WIDTH * (WIDTH + 1)
    config = trainer.OffloadConfig(param_persistence_threshold=0, max_live_bytes=limit)

    def run(model: Any, optimizer: torch.optim.Optimizer) -> list[Any]:
        results: list[Any] = [_train(model, optimizer) for _ in range(2)]
        counter = Counter(model) if find(model) is not None else None
        for _ in range(2):
            results.append(interruption(model, optimizer))
            results.append(_train(model, optimizer))
            if counter is not None:
                nothing_gathered(model)
                # Not counting what the interruption itself does.
                counter.share()
            results += [_train(model, optimizer) for _ in range(2)]
            if counter is not None:
                assert counter.share() >= 0.9
        return results

    def observed(model: Any, optimizer: torch.optim.Optimizer) -> list[Any]:
        if find(model) is None:
            return run(model, optimizer)
        with Observer(model) as observer:
            results = run(model, optimizer)
        assert observer.checks and observer.peak_bytes <= (limit or whole)
        return results

    same(cluster.addresses, job_name, Raises, observed, config=config)


def test_a_model_that_was_removed_is_followed_anew(cluster: LocalCluster, job_name: str) -> None:
    def run(model: Any, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
        results = [_train(model, optimizer) for _ in range(3)]
        if (offloaded_model := find(model)) is not None:
            # With requests for a backward that will not come on their way.
            _loss(model)
            job = offloaded_model.job
            trainer.remove(model)
            assert all(offloaded(param) is None for param in model.parameters())
            trainer.offload(model, job, trainer.OffloadConfig(param_persistence_threshold=0))
            optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)
        else:
            _loss(model)
        results += [_train(model, optimizer) for _ in range(3)]
        if find(model) is not None:
            report = trainer.report(model)
            assert report.hits >= 0.9 * report.gathers
        return results

    same(cluster.addresses, job_name, Raises, run)


class Keeps(nn.Module):
    """Hands out a view of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.linear(x), self.linear.weight.view(-1)


def test_what_somebody_holds_a_view_of_is_not_counted_once_it_is_converted(
    cluster: LocalCluster, job_name: str
) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job, torch.no_grad():
        model = trainer.offload(Keeps(), job, trainer.OffloadConfig(param_persistence_threshold=0))
        for dtype in (torch.float64, torch.float32, torch.float64):
            x, view = model(torch.randn(2, WIDTH, dtype=next(model.parameters()).dtype))
            assert trainer.report(model).live_bytes == view.untyped_storage().nbytes()
            model.to(dtype)
            # It is the view's alone now.
            assert trainer.report(model).live_bytes == 0
            assert trainer.report(model).live_parameters == 0
            del view, x
        with Observer(model):
            model(torch.randn(2, WIDTH, dtype=torch.float64))


def test_what_was_asked_at_a_step_that_is_over_is_asked_anew(cluster: LocalCluster, job_name: str) -> None:
    """A forward asks ahead for its backward, which does not come; a step comes instead."""
    config = trainer.OffloadConfig(param_persistence_threshold=0, max_reuse_distance=0)

    def run(model: Any, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
        results = [_train(model, optimizer) for _ in range(3)]
        _loss(model).backward()
        if find(model) is None:
            _loss(model)
            optimizer.step()
        else:
            with SlowLinks(model) as links:
                handle = model.layers[9].register_forward_hook(lambda *_: links.hold())
                _loss(model)
                handle.remove()
                asked = len(links.asked)
                links.let_go(0.3)
                optimizer.step()
                assert trainer.report(model).live_bytes == 0
                held = [names for names in links.asked[:asked] if names[0].startswith("layers")]
                assert held
            for param in model.parameters():
                with trainer.gathered(param):
                    pass
        optimizer.zero_grad()
        return [*results, *(_train(model, optimizer) for _ in range(2))]

    same(cluster.addresses, job_name, Raises, run, config=config)
