"""To servers and back through `zero-ps import` and `zero-ps export`: the model is the same, bit for bit."""

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import trainer
from ps import LocalCluster
from ps.tools.export_model import ExportOptions, export
from ps.tools.import_model import ImportOptions, import_model
from tests.models import Residual, batch, seeded, train
from tests.trainer.runs import gathered_values

LARGE = {"vocabulary": 3001, "width": 700, "layers": 1}
"""Some parameters have several chunks."""


class Adapted(nn.Module):
    """A frozen bf16 layer with a trained fp32 adapter beside it, tied output weights and persistent buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(101, 48)
        self.base = nn.Linear(48, 48, dtype=torch.bfloat16).requires_grad_(False)
        self.down = nn.Linear(48, 4, bias=False)
        self.up = nn.Linear(4, 48, bias=False)
        self.norm = nn.BatchNorm1d(48)
        self.head = nn.Linear(48, 101, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(0.25, dtype=torch.bfloat16))
        self.register_buffer("unsaved", torch.ones(3), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        x = x + self.base(x.to(torch.bfloat16)).float() + self.scale.float() * self.up(self.down(x))
        return self.head(self.norm(x.flatten(0, -2)).view(x.shape))


MODELS = {"plain": lambda: Residual(**LARGE), "adapted": Adapted}


@dataclass
class Servers:
    cluster: LocalCluster
    folders: list[Path]
    checkpoints: Path


@pytest.fixture(scope="module", params=[1, 3])
def servers(request, tmp_path_factory) -> Iterator[Servers]:
    """Servers over folders into which both models were imported."""
    folder = tmp_path_factory.mktemp("imported")
    dirs = [folder / f"shard-{shard}" for shard in range(request.param)]
    for name, make in MODELS.items():
        state = {
            key: value for key, value in seeded(make).state_dict().items() if key != "head.weight" or name == "plain"
        }
        safetensors.torch.save_file(state, folder / f"{name}.safetensors")
    import_model(folder / "plain.safetensors", dirs, ImportOptions("plain", step=7))
    adapted = ImportOptions("adapted", frozen=("base.*",), buffers=("norm.running_*", "norm.num_*", "scale"))
    import_model(folder / "adapted.safetensors", dirs, adapted)
    with LocalCluster(servers=request.param, data_dir=folder) as cluster:
        assert cluster.data_dirs == dirs
        yield Servers(cluster, dirs, folder)


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(batch(100)).clone()


def adamw(model: nn.Module, **options: object) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True, **options)


@pytest.mark.parametrize("name", MODELS)
def test_an_imported_model_trains_as_plain_torch_and_what_is_exported_is_the_plain_model(
    servers: Servers, tmp_path: Path, name: str
) -> None:
    plain = seeded(MODELS[name]).train()
    optimizer = adamw(plain)
    with trainer.connect(servers.cluster.addresses, job=name) as job:
        assert (job.step, job.exists) == (7 if name == "plain" else 0, True)
        assert job.metadata == {"imported_from": f"{name}.safetensors"}
        with job.init() if name == "plain" else nullcontext():
            model = seeded(MODELS[name], seed=1).train()
        trainer.offload(model, job)
        # The values are the servers': nothing of this model went there.
        assert job.stats.bytes_pushed == 0
        assert torch.equal(outputs(copy.deepcopy(plain).eval()), outputs(model.eval()))
        trained = [param for param in model.train().parameters() if param.requires_grad]
        remote = trainer.RemoteOptimizer(trained, torch.optim.AdamW, lr=1e-2)
        assert train(model, remote, range(3)) == train(plain, optimizer, range(3))
        job.commit()
        ahead = gathered_values(model)

    for form in ("safetensors", "torch"):
        export(servers.folders, ExportOptions(form, tmp_path / form, state=True), job=name)
    fresh = seeded(MODELS[name], seed=2)
    if name == "plain":
        fresh.load_state_dict(torch.load(tmp_path / "torch/model.pt", weights_only=True))
    else:
        missing = fresh.load_state_dict(torch.load(tmp_path / "torch/model.pt", weights_only=True), strict=False)
        assert missing.missing_keys == ["head.weight"] and missing.unexpected_keys == []
    again = seeded(MODELS[name], seed=3)
    safetensors.torch.load_model(again, tmp_path / "safetensors/model.safetensors")
    for key, value in plain.state_dict().items():
        for found in (fresh, again):
            assert found.state_dict()[key].dtype == value.dtype, key
            assert torch.equal(found.state_dict()[key], value), key
    for key, value in fresh.named_parameters():
        assert torch.equal(value, ahead[key]), key
    assert torch.equal(outputs(fresh.eval()), outputs(copy.deepcopy(plain).eval()))

    # The optimizer goes on in plain torch where the servers stopped.
    if name == "adapted":
        later = adamw(fresh, betas=(0.5, 0.5))
        later.load_state_dict(torch.load(tmp_path / "torch/optimizer.pt", weights_only=True))
        assert train(fresh.train(), later, range(3, 6)) == train(plain.train(), optimizer, range(3, 6))


def test_an_exported_commit_is_imported_again(servers: Servers, tmp_path: Path) -> None:
    export(servers.folders, ExportOptions("safetensors", tmp_path / "out", max_shard_bytes=10_000), job="adapted")
    options = ImportOptions("again", frozen=("base.*",), buffers=("norm.running_*", "norm.num_*", "scale"))
    import_model(tmp_path / "out", [tmp_path / "data"], options)
    export([tmp_path / "data"], ExportOptions("safetensors", tmp_path / "back"))
    before = safetensors.torch.load_file(tmp_path / "back/model.safetensors")
    index_of = {path: safetensors.torch.load_file(path) for path in (tmp_path / "out").glob("*.safetensors")}
    after = {key: value for tensors in index_of.values() for key, value in tensors.items()}
    assert len(index_of) > 1 and before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)


class Other(Adapted):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Parameter(torch.zeros(2))


def without_buffer() -> nn.Module:
    model = Adapted()
    model.register_buffer("scale", None)
    return model


DIFFERENT = {
    "parameter 'more' differs, the job does not have it": Other,
    "parameter 'scale' differs, this model does not have it": without_buffer,
    "'base.weight' differs, its dtype is bfloat16 in the job and float32 in this model": lambda: (
        Adapted().requires_grad_(True)
    ),
    "'embedding.weight' differs, its dtype is float32 in the job and bfloat16 in this model": lambda: (
        Adapted().requires_grad_(False).to(torch.bfloat16)
    ),
}


@pytest.mark.parametrize("message", DIFFERENT)
def test_another_model_than_the_imported_one_is_told_what_differs(servers: Servers, message: str) -> None:
    with trainer.connect(servers.cluster.addresses, job="adapted") as job:
        with pytest.raises(trainer.JobMismatch) as error:
            trainer.offload(seeded(DIFFERENT[message]), job)
        assert message in str(error.value)
