"""`trainer.gathered`, state dicts, and what may be asked of released parameters."""

import copy
import pickle

import pytest
import torch
from torch import nn

import trainer
from ps import LocalCluster
from tests.models import seeded
from tests.ranks import run_ranks
from tests.trainer.lifecycle.comparing import assert_equal, nothing_gathered, step
from tests.trainer.runs import gathered_values


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))


@pytest.fixture
def job(cluster: LocalCluster, job_name: str):
    with trainer.connect(cluster.addresses, job=job_name) as job:
        yield job


@pytest.fixture
def model(job: trainer.Job) -> nn.Module:
    return trainer.offload(seeded(make), job, trainer.OffloadConfig(param_persistence_threshold=0))


def test_parameters_are_whole_inside_and_released_outside(model: nn.Module) -> None:
    plain = seeded(make)
    with trainer.gathered(model[0].weight):
        assert torch.equal(model[0].weight, plain[0].weight)
        with pytest.raises(trainer.ReleasedParameterError, match=r"'2\.weight'"):
            model[2].weight.sum()
    nothing_gathered(model)
    with trainer.gathered(model):
        assert_equal(dict(model.named_parameters()), dict(plain.named_parameters()))
        # The model works inside too.
        model(torch.randn(3, 5)).sum().backward()
        assert type(model[0].weight) is nn.Parameter
    nothing_gathered(model)


def test_contexts_nest_and_overlap(model: nn.Module) -> None:
    with trainer.gathered(model.parameters()):
        with trainer.gathered([model[0].weight, model[2].weight]):
            pass
        assert model[0].weight.isfinite().all()
        with trainer.gathered(model[0].weight, modify=True), torch.no_grad():
            model[0].weight.fill_(3.0)
        # The outer context holds what the inner one kept.
        assert (model[0].weight == 3).all()
    first, second = trainer.gathered(model[0].weight), trainer.gathered(model[0].weight)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert (model[0].weight == 3).all()
    second.__exit__(None, None, None)
    nothing_gathered(model)


@pytest.mark.parametrize("how", ["in place", "data", "item", "copy"])
def test_a_change_without_modify_raises_and_names_the_parameter(model: nn.Module, how: str) -> None:
    before = gathered_values(model)
    changed = pytest.raises(trainer.ModifiedParameterError, match=r"'0\.weight' was changed")
    with changed, trainer.gathered(model), torch.no_grad():
        match how:
            case "in place":
                model[0].weight.mul_(2)
            case "data":
                model[0].weight.data.add_(1)
            case "item":
                model[0].weight[3, 2] = 7
            case "copy":
                model[0].weight.copy_(torch.zeros(6, 5))
    # The change is gone.
    assert_equal(gathered_values(model), before)


def test_modify_keeps_changes_and_an_exception_drops_them(job: trainer.Job, model: nn.Module) -> None:
    with trainer.gathered(model, modify=True), torch.no_grad():
        model[0].weight.zero_()
        model[2].bias.data.fill_(2)
    values = gathered_values(model)
    assert (values["0.weight"] == 0).all() and (values["2.bias"] == 2).all()
    with pytest.raises(ZeroDivisionError), trainer.gathered(model, modify=True), torch.no_grad():
        model[0].weight.fill_(1)
        raise ZeroDivisionError
    assert_equal(gathered_values(model), values)
    assert model(torch.zeros(3, 5)).shape == (3, 2)


def test_modify_in_16_bits_keeps_the_masters_of_what_did_not_change(cluster: LocalCluster, job_name: str) -> None:
    plain = seeded(make)
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(seeded(make), job, trainer.OffloadConfig(param_dtype=torch.bfloat16))
        with trainer.gathered(model[0].weight, modify=True), torch.no_grad():
            model[0].weight[0] = 0.5
        trainer.remove(model)
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(seeded(make, seed=3), job)
        with torch.no_grad():
            plain[0].weight[0] = 0.5
        assert_equal(gathered_values(model), dict(plain.named_parameters()))


def test_rank_0s_changes_reach_every_rank(cluster: LocalCluster, job_name: str) -> None:
    ranks = run_ranks("trainer.lifecycle.on_ranks:edits", cluster.addresses, 2, job=job_name)
    for rank in ranks:
        assert (rank["after_edit"]["first.weight"] == 1).all()
        assert not (rank["after_edit"]["first.bias"] == 9).any()
        assert "'first.weight' was changed" in rank["error"]
        assert_equal(rank["before_load"], rank["after_edit"])
        assert all((value == 0.25).all() for value in rank["after_load"].values())
    assert_equal(ranks[0]["params"], ranks[1]["params"])


def test_a_state_dict_needs_no_fetch_and_can_be_used_where_it_is_whole(job: trainer.Job, model: nn.Module) -> None:
    pulled = job.stats.bytes_pulled
    state = model.state_dict()
    assert {name: (tuple(v.shape), v.dtype) for name, v in state.items()} == {
        name: (tuple(v.shape), v.dtype) for name, v in seeded(make).state_dict().items()
    }
    assert "released" in repr(state["0.weight"]).lower()
    assert job.stats.bytes_pulled == pulled
    with pytest.raises(trainer.ReleasedParameterError, match=r"'0\.weight'"):
        state["0.weight"] + 1
    with pytest.raises(TypeError, match=r"'0\.weight' is offloaded and cannot be copied"):
        pickle.dumps(state["0.weight"])
    nothing_gathered(model)
    with trainer.gathered(model):
        # Also the one taken before.
        assert_equal({n: v.clone() for n, v in state.items()}, seeded(make).state_dict())
        torch.save(model.state_dict(), "/dev/null")
        saved = {name: value.clone() for name, value in model.state_dict().items()}
    del state
    assert_equal(saved, seeded(make).state_dict())
    nothing_gathered(model)


@pytest.mark.parametrize("strict", [True, False])
def test_load_state_dict_writes_to_the_servers(job: trainer.Job, model: nn.Module, strict: bool) -> None:
    other = seeded(make, seed=5).state_dict()
    if not strict:
        del other["0.bias"]
        other["unknown"] = torch.zeros(3)
        with pytest.raises(RuntimeError, match="Missing key"):
            model.load_state_dict(other)
    model.load_state_dict(other, strict=strict)
    nothing_gathered(model)
    values = gathered_values(model)
    for name, value in values.items():
        assert torch.equal(value, other.get(name, seeded(make).state_dict()[name])), name
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**model.state_dict(), "0.weight": torch.zeros(2, 2)}, strict=False)


def test_copies_are_refused_with_the_way_out(model: nn.Module) -> None:
    for refused in (model, model[0], model[0].weight):
        with pytest.raises(TypeError, match=r"trainer\.remove"):
            copy.deepcopy(refused)
        with pytest.raises(TypeError, match=r"trainer\.remove"):
            pickle.dumps(refused)


def test_to_changes_what_is_computed_with_and_fetches_nothing(job: trainer.Job, model: nn.Module) -> None:
    pulled = job.stats.bytes_pulled
    assert model.to("cpu") is model
    assert model.to(torch.float32) is model
    model.to(torch.bfloat16)
    assert job.stats.bytes_pulled == pulled
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    out = model(torch.randn(3, 5, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    model.float()
    nothing_gathered(model)
    assert_equal(gathered_values(model), dict(seeded(make).named_parameters()))
    step(trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1))


def test_questions_about_a_released_parameter_need_no_fetch(job: trainer.Job, model: nn.Module) -> None:
    pulled = job.stats.bytes_pulled
    weight = model[0].weight
    assert (weight.shape, weight.size(0), weight.dim(), weight.ndim) == ((6, 5), 6, 2, 2)
    assert (weight.numel(), weight.dtype, weight.device.type, len(weight)) == (30, torch.float32, "cpu", 6)
    assert (weight.requires_grad, weight.is_leaf, weight.grad, weight.grad_fn) == (True, True, None, None)
    assert weight.is_floating_point() and weight.is_contiguous() and not weight.is_sparse
    assert weight.element_size() * weight.nelement() == 120
    assert isinstance(weight, nn.Parameter) and weight in {weight}
    assert "0.weight" in repr(weight) and "(6, 5)" in repr(weight)
    assert "Linear(in_features=5" in repr(model)
    assert sum(p.numel() for p in model.parameters()) == 62
    assert job.stats.bytes_pulled == pulled
    nothing_gathered(model)


def test_what_is_not_offloaded_is_left_alone() -> None:
    layer = nn.Linear(2, 2)
    with trainer.gathered(layer), torch.no_grad():
        layer.weight.fill_(1)
    assert (layer.weight == 1).all()
