"""What would be wrong in silence, or crash, if nothing caught it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import trainer
from ps import LocalCluster
from tests.models import seeded
from tests.trainer.lifecycle.comparing import AT_ONCE, nothing_gathered, same, step, steps
from tests.trainer.lifecycle.test_backward import Mlp
from tests.trainer.runs import gathered_values


class Entangled(nn.Module):
    """Nested reentrant checkpoints over tied and external weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.middle = nn.Linear(5, 5)
        self.last = nn.Linear(5, 5, bias=False)
        self.last.weight = self.first.weight

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.middle(x) + F.linear(x, self.first.weight))

    def outer(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(checkpoint(self.inner, torch.tanh(self.first(x)), use_reentrant=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_()
        return checkpoint(self.outer, checkpoint(self.inner, x, use_reentrant=True), use_reentrant=True)


class GradInNoGrad(nn.Module):
    """Called under no_grad, which it switches off for a part."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.scale = nn.Parameter(torch.randn(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = self.linear(x)
            with torch.enable_grad():
                return self.part(x)

    def part(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.scale).square()


class Converting(nn.Module):
    """Converts a parameter of another module on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return User(self.other)(x)


class User(nn.Module):
    def __init__(self, other: nn.Linear) -> None:
        super().__init__()
        self.others = [other]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.double(), self.others[0].weight.to(torch.float64)).float()


@pytest.mark.parametrize("make", [Entangled, GradInNoGrad, Converting])
def test_models_that_use_parameters_in_unusual_places(cluster: LocalCluster, job_name: str, make: Any) -> None:
    same(cluster.addresses, job_name, make, steps(4, 5))


def test_losses_computed_in_gathered_and_differentiated_outside(cluster: LocalCluster, job_name: str) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for number in range(4):
            with trainer.gathered(model):
                penalty = sum(p.pow(2).sum() for p in model.parameters())
                if number == 0:
                    # Before any forward.
                    (2 * penalty).backward()
                    penalty = None
            if penalty is not None:
                (model(torch.randn(2, 5)).square().mean() + penalty).backward()
            step(optimizer)

    same(cluster.addresses, job_name, Mlp, run)


def test_assigning_data_in_gathered_is_an_edit(cluster: LocalCluster, job_name: str) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        with trainer.gathered(model, modify=True):
            vector = nn.utils.parameters_to_vector(model.parameters()).detach()
            nn.utils.vector_to_parameters(vector * 0.5, model.parameters())
        with trainer.gathered(model):
            for param in model.parameters():
                param.data = param.data.clone()
        return steps(4, 5)(model, optimizer)

    same(cluster.addresses, job_name, Mlp, run)
    with trainer.connect(cluster.addresses, job=f"{job_name}-2") as job:
        model = trainer.offload(Mlp(), job, AT_ONCE)
        with pytest.raises(trainer.ModifiedParameterError), trainer.gathered(model):
            model.layers[0].weight.data = torch.zeros(8, 5)
        nothing_gathered(model)
        assert gathered_values(model)["layers.0.weight"].abs().sum() > 0


class Clamping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.weight.clamp_(-0.1, 0.1)
        return x @ self.weight


class Assigning(Clamping):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.weight.data = self.weight.data.clamp(-0.1, 0.1)
        return x @ self.weight


@pytest.mark.parametrize("make", [Clamping, Assigning])
def test_a_forward_that_changes_its_parameters_is_an_error(cluster: LocalCluster, job_name: str, make: Any) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(nn.Sequential(make()), job, AT_ONCE)
        with pytest.raises(trainer.ModifiedParameterError, match=r"'0\.weight' was changed in place in the forward of"):
            model(torch.randn(2, 5))
        nothing_gathered(model)


def test_a_parameter_belongs_to_one_job(cluster: LocalCluster, job_name: str) -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    with (
        trainer.connect(cluster.addresses, job=f"{job_name}-a") as a,
        trainer.connect(cluster.addresses, job=f"{job_name}-b") as b,
    ):
        trainer.offload(model, a)
        with pytest.raises(trainer.ConfigError, match=r"'weight' is offloaded already, as '0\.weight' of job"):
            trainer.offload(model[0], b)
        with pytest.raises(trainer.ConfigError, match="already"):
            trainer.offload(nn.Sequential(nn.Linear(2, 2), model), b)


def test_different_parameters_over_the_same_memory_are_refused(cluster: LocalCluster, job_name: str) -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    model[1].weight.data = model[0].weight.data
    with trainer.connect(cluster.addresses, job=job_name) as job:
        with pytest.raises(trainer.ConfigError, match=r"'0\.weight' and '1\.weight'.*same memory"):
            trainer.offload(model, job)
        # Parts of one block that do not overlap are fine.
        flat = torch.randn(50)
        for index in range(2):
            model[index].weight.data = flat[25 * index : 25 * index + 25].view(5, 5)
        trainer.offload(model, job)
        values = gathered_values(model)
        assert torch.equal(torch.cat([values["0.weight"], values["1.weight"]]).flatten(), flat)


@pytest.mark.parametrize("how", ["gathered", "load"])
def test_values_replaced_between_forward_and_backward_are_an_error(
    cluster: LocalCluster, job_name: str, how: str
) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(Mlp(), job, AT_ONCE)
        loss = model(torch.randn(2, 5)).sum()
        if how == "gathered":
            with trainer.gathered(model, modify=True), torch.no_grad():
                for param in model.parameters():
                    param.mul_(2)
        else:
            model.load_state_dict(seeded(Mlp, 5).state_dict())
        with pytest.raises(RuntimeError, match="replaced between forward and backward"):
            loss.backward()


def test_only_the_optimizer_that_was_made_last_steps(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(Mlp(), job)
        first = trainer.RemoteOptimizer(model.layers[0].parameters(), torch.optim.SGD, lr=0.1)
        second = trainer.RemoteOptimizer(model.layers[2].parameters(), torch.optim.SGD, lr=0.1)
        model(torch.randn(2, 5)).sum().backward()
        with pytest.raises(trainer.ConfigError, match="a job has one optimizer"):
            first.step()
        second.step()


def test_a_buffer_that_changed_its_shape_is_refused_by_name(cluster: LocalCluster, job_name: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_buffer("seen", torch.zeros(3))
    with trainer.connect(cluster.addresses, job=job_name) as job:
        trainer.offload(model, job)
        for changed in (torch.zeros(4), torch.zeros(2), None):
            model[0].seen = changed
            with pytest.raises(trainer.ConfigError, match=r"buffer '0\.seen'"):
                job.commit()
        model[0].seen = torch.ones(3)
        job.commit()


def test_a_kept_graph_holds_one_layer_at_a_time(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(nn.Sequential(*[nn.Linear(5, 5) for _ in range(6)]), job, AT_ONCE)
        whole = []
        for layer in model:
            layer.register_full_backward_hook(
                lambda *_: whole.append(sum(p.untyped_storage().nbytes() > 0 for p in model.parameters()))
            )
        model(torch.randn(2, 5)).sum().backward(retain_graph=True)
        assert max(whole) <= 4


class Chooser(nn.Module):
    """Uses the weight of one of many others, another one each time."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(5, 5, bias=False) for _ in range(12)])

    def forward(self, x: torch.Tensor, choice: int) -> torch.Tensor:
        return F.linear(x, self.experts[choice].weight)


def test_external_parameters_that_are_not_used_any_more_are_not_fetched(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(Chooser(), job, AT_ONCE)
        pulled = []
        for number in range(36):
            before = job.stats.bytes_pulled
            with torch.no_grad():
                model(torch.randn(2, 5), number % 12)
            pulled.append((job.stats.bytes_pulled - before) // 100)
        assert max(pulled) <= 5
        nothing_gathered(model)


def test_released_parameters_that_were_converted_have_no_values(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(Mlp(), job, AT_ONCE)
        converted = {name: value.double() for name, value in model.state_dict().items()}
        with trainer.gathered(model):
            with pytest.raises(trainer.ReleasedParameterError, match=r"converted to torch\.float64: it has no values"):
                converted["layers.0.weight"].clone()
            model.state_dict()["layers.0.weight"].double().clone()


def test_numpy_may_share_a_gathered_parameter(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(Mlp(), job, AT_ONCE)
        for _ in range(2):
            with trainer.gathered(model):
                total = sum(float(p.detach().numpy().sum()) for p in model.parameters())
            assert total == pytest.approx(float(sum(v.sum() for v in gathered_values(model).values())), abs=1e-4)
        nothing_gathered(model)


def test_a_step_inside_gathered_is_no_edit(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(Mlp(), job, AT_ONCE)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        with trainer.gathered(model):
            for _ in range(2):
                model(torch.randn(2, 5)).sum().backward()
                step(optimizer)
            model(torch.randn(2, 5))
        nothing_gathered(model)


def test_what_torch_reads_below_python_is_refused_where_it_can_be(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(Mlp(), job, AT_ONCE)
        weight = model.layers[0].weight
        with pytest.raises(trainer.ReleasedParameterError):
            weight.as_subclass(torch.Tensor)
        for use in (weight.numpy, weight.tolist, weight.item):
            with pytest.raises(trainer.ReleasedParameterError):
                use()
        assert set(model._ddp_params_and_buffers_to_ignore) == {name for name, _ in model.named_parameters()}


def test_dtypes_that_cannot_be_stored_are_refused_while_a_model_is_built(cluster: LocalCluster, job_name: str) -> None:
    refused = pytest.raises(trainer.ConfigError, match="parameter 'weight' of a Linear: .*complex64")
    with trainer.connect(cluster.addresses, job=job_name) as job, refused, job.init():
        nn.Linear(2, 2, dtype=torch.complex64)
