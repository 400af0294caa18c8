"""Servers whose memory holds a tenth of their shard train as those do that hold all of it, bit for bit."""

import tempfile
from pathlib import Path

import grpc
import pytest
import safetensors.torch
import torch
from torch import nn

import trainer
from protos import zero_ps_pb2 as pb
from protos import zero_ps_pb2_grpc
from ps import LocalCluster
from ps.tools.import_model import ImportOptions, import_model
from tests.models import seeded
from tests.ranks import run_ranks
from tests.trainer.runs import clipped_adamw

LAYERS, WIDTH = 40, 256
WEIGHT_BYTES = LAYERS * WIDTH * WIDTH * 4

BEYOND_BYTES = 600 << 20
"""What a server's process takes besides its memory limit: Python, torch, gRPC. It does not depend on the model."""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_tenth_of_the_shard_in_memory_gives_the_same_bits_of_everything(tmp_path: Path) -> None:
    """Two trainers, AdamW, clipping, micro-batches; a commit, a restart from it, and on."""
    memory = WEIGHT_BYTES * (3 + 2) // 10
    with LocalCluster(1, data_dir=tmp_path / "all") as cluster:
        expected = train(cluster, [2, 4])
        assert not list((tmp_path / "all").glob("*/deep/working/*")), "a server without a limit needs no disk"
    with LocalCluster(1, data_dir=tmp_path / "tenth", memory=memory) as cluster:
        before = train(cluster, [2])
        cluster.restart(0)
        assert not list((tmp_path / "tenth").glob("*/deep/working/*"))
        after = train(cluster, [4])
        status = status_of(cluster)
    assert status.spilled_bytes > WEIGHT_BYTES * 2
    assert 0 < status.peak_resident_bytes <= status.memory_limit_bytes == memory
    assert status.peak_rss_bytes < memory + BEYOND_BYTES
    for all_of_it, first, second in zip(expected, before, after, strict=True):
        assert (first["started_at"], second["started_at"]) == (0, 2)
        assert first["losses"] + second["losses"] == all_of_it["losses"]
        assert all(torch.equal(second["params"][name], value) for name, value in all_of_it["params"].items())
    for step in ("00000002", "00000004"):
        assert chunk_files(tmp_path / "tenth", step) == chunk_files(tmp_path / "all", step)


def test_a_limited_server_answers_in_the_dtype_of_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    runs = []
    for memory in (None, "3MiB"):
        with LocalCluster(1, memory=memory) as cluster:
            runs.append(clipped_adamw(cluster.addresses, "deep", 16, WIDTH, [3], "bfloat16"))
    assert runs[0]["losses"] == runs[1]["losses"]
    assert all(torch.equal(runs[0]["params"][name], value) for name, value in runs[1]["params"].items())


def test_what_does_not_fit_is_spread_over_the_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is another file system, where there is one: nothing can be linked or renamed across."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as other:
        with LocalCluster(1, data_dir=tmp_path / "all") as cluster:
            expected = clipped_adamw(cluster.addresses, "deep", 16, WIDTH, [2, 4])
        with LocalCluster(1, data_dir=[tmp_path / "a", Path(other) / "b"], memory="3MiB") as cluster:
            before = clipped_adamw(cluster.addresses, "deep", 16, WIDTH, [2])
            for folder in cluster.disks[0]:
                assert list(folder.glob("deep/working/shard-*/weight/*/c/*/0")), folder
            cluster.restart(0)
            assert not [list(folder.glob("deep/working/*")) for folder in cluster.disks[0]][1]
            after = clipped_adamw(cluster.addresses, "deep", 16, WIDTH, [4])
    assert before["losses"] + after["losses"] == expected["losses"]
    assert all(torch.equal(after["params"][name], value) for name, value in expected["params"].items())


def test_what_is_too_large_for_a_server_is_refused_as_such_and_what_fits_goes_on() -> None:
    with LocalCluster(1, memory="6MiB") as cluster, trainer.connect(cluster.addresses) as job:
        with pytest.raises(trainer.ServerFull, match=r"chunk 0 of 'weight' .* start it with --memory \d+") as refused:
            trainer.offload(nn.Linear(1024, 512, bias=False), job)
        assert not isinstance(refused.value, trainer.JobMismatch)
        model = trainer.offload(nn.Linear(512, 512, bias=False), job)
        with pytest.raises(trainer.ServerFull, match=r"an update of chunk 0 of 'weight' needs 7.0 MiB") as refused:
            trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-3)
        assert not isinstance(refused.value, trainer.JobMismatch)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=1e-3)
        model(torch.randn(2, 512)).sum().backward()
        optimizer.step()
        job.commit()


class Imported(nn.Module):
    """Of each kind something that is spilled: trained, frozen in 16 bits, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(12))
        self.frozen = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16).requires_grad_(False)
        self.register_buffer("scale", torch.rand(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x + self.frozen(x.bfloat16()).float() @ self.scale


def test_an_imported_model_trains_as_in_plain_torch_where_a_fraction_fits(tmp_path: Path) -> None:
    plain = seeded(Imported)
    source = tmp_path / "model.safetensors"
    safetensors.torch.save_file({name: value.clone() for name, value in plain.state_dict().items()}, source)
    options = ImportOptions("default", frozen=("frozen.*",), buffers=("scale",))
    import_model(source, [tmp_path / f"data/shard-{shard}" for shard in range(2)], options)
    expected = steps(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True), range(4))
    losses = []
    with LocalCluster(2, data_dir=tmp_path / "data", memory="3MiB") as cluster:
        for run in (range(2), range(2, 4)):
            with trainer.connect(cluster.addresses) as job:
                assert job.step == run.start
                model = trainer.offload(seeded(Imported, seed=9), job)
                losses += steps(model, trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2), run)
                job.commit()
                with trainer.gathered(model.parameters()):
                    found = {name: value.clone() for name, value in model.state_dict().items()}
            for server in range(2):
                status = status_of(cluster, server)
                assert status.spilled_bytes > 0
                assert status.peak_resident_bytes <= status.memory_limit_bytes
                if run.start == 0:
                    cluster.restart(server)
    assert losses == expected
    assert all(torch.equal(found[name], value) for name, value in plain.state_dict().items())


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> list[float]:
    losses = []
    for number in numbers:
        x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(number))
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train(cluster: LocalCluster, commits: list[int]) -> list[dict]:
    return run_ranks(
        "trainer.runs:clipped_adamw",
        cluster.addresses,
        2,
        timeout=200,
        job="deep",
        layers=LAYERS,
        width=WIDTH,
        commits=commits,
    )


def status_of(cluster: LocalCluster, server: int = 0) -> pb.StatusResponse:
    with grpc.insecure_channel(cluster.addresses[server]) as channel:
        return zero_ps_pb2_grpc.ParameterServerStub(channel).Status(pb.StatusRequest(), timeout=10)


def chunk_files(data_dir: Path, step: str) -> dict[str, bytes]:
    """The bytes of every chunk file of a commit."""
    folder = data_dir / "shard-0" / "deep" / "generations" / step
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".json"
    }
