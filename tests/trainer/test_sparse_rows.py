"""`OffloadConfig(sparse_rows=...)`: embeddings that gather rows give the bits of plain torch."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import trainer
from ps import LocalCluster
from tests.models import seeded
from tests.ranks import run_ranks
from tests.trainer.runs import gathered_values

ROWS, WIDTH = 9000, 320
"""Three chunks of the table."""


class Tagger(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, WIDTH, **options)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(tokens))


@pytest.fixture(scope="module")
def servers() -> Iterator[LocalCluster]:
    """One for each chunk of the table."""
    with LocalCluster(3) as cluster:
        yield cluster


def tokens_of(step: int) -> torch.Tensor:
    """Some of them come more than once; of the last chunk none in the first steps."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 3000 * min(3, step + 1), (2, 16), generator=generator)
    tokens[0, :3] = 7
    return tokens


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> list[torch.Tensor]:
    outputs = []
    for step in range(steps):
        for half in tokens_of(step):
            output = model(half)
            output.square().mean().backward()
            outputs.append(output.detach())
        optimizer.step()
        optimizer.zero_grad()
    return outputs


@pytest.mark.parametrize(
    ("options", "choice"),
    [({}, True), ({"padding_idx": 7}, (nn.Embedding,)), ({"scale_grad_by_freq": True}, ("table",))],
    ids=["all", "padding by class", "frequencies by name"],
)
def test_training_gives_the_bits_of_plain_torch(
    servers: LocalCluster, job_name: str, options: dict[str, object], choice: object
) -> None:
    plain = seeded(lambda: Tagger(**options))
    expected = train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True))
    with trainer.connect(servers.addresses, job=job_name) as job:
        model = seeded(lambda: Tagger(**options))
        # A limit that the table alone would go beyond by far.
        trainer.offload(model, job, trainer.OffloadConfig(sparse_rows=choice, max_live_bytes=64 << 10))
        pulled = job.stats.bytes_pulled
        outputs = train(model, trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2))
        assert all(map(torch.equal, outputs, expected))
        assert job.stats.bytes_pulled - pulled < 8 * 20 * WIDTH * 4, "no more than the rows"
        with torch.inference_mode():
            assert torch.equal(model(tokens_of(9)), plain(tokens_of(9)))
        trainer.remove(model)
    for name, value in plain.named_parameters():
        assert torch.equal(value, model.get_parameter(name)), name
    assert "forward" not in model.table.__dict__


def test_clipping_sees_the_same_gradients(servers: LocalCluster, job_name: str) -> None:
    plain = seeded(Tagger)
    plain(tokens_of(0)).square().mean().backward()
    expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    with trainer.connect(servers.addresses, job=job_name) as job:
        model = seeded(Tagger)
        trainer.offload(model, job, trainer.OffloadConfig(sparse_rows=True))
        model(tokens_of(0)).square().mean().backward()
        norm = trainer.clip_grad_norm_(model.parameters(), 1.0)
        torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)


def test_two_trainers_name_rows_of_their_own(cluster: LocalCluster, job_name: str) -> None:
    run = {"function": "trainer.test_sparse_rows:train_half", "addresses": cluster.addresses, "world_size": 2}
    sparse = run_ranks(**run, job=job_name, sparse=True)
    dense = run_ranks(**run, job=f"{job_name}-dense", sparse=False)
    for name, value in dense[0].items():
        assert torch.equal(sparse[0][name], value), name


def train_half(addresses: list[str], job: str, sparse: bool) -> dict[str, torch.Tensor]:
    """Trains on the rows of tokens that are this rank's."""
    with trainer.connect(addresses, job=job) as connection:
        model = seeded(Tagger)
        trainer.offload(model, connection, trainer.OffloadConfig(sparse_rows=sparse))
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.Adam, lr=1e-2)
        for step in range(3):
            model(tokens_of(step)[connection.rank]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return gathered_values(model)


def test_a_sparse_gradient_of_torch_travels_as_rows(servers: LocalCluster, job_name: str) -> None:
    with trainer.connect(servers.addresses, job=job_name) as job:
        model = seeded(lambda: Tagger(sparse=True))
        trainer.offload(model, job)
        pushed = job.stats.bytes_pushed
        outputs = train(model, trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=1e-2))
        assert job.stats.bytes_pushed - pushed < 8 * 20 * WIDTH * 4
    plain = seeded(Tagger)
    assert all(map(torch.equal, outputs, train(plain, torch.optim.SGD(plain.parameters(), lr=1e-2, fused=True))))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(tokens))


@pytest.mark.parametrize("choice", [True, ("table",)])
def test_a_tied_table(cluster: LocalCluster, job_name: str, choice: object) -> None:
    plain = seeded(Tied)
    tokens = torch.arange(5)
    plain(tokens).square().mean().backward()
    torch.optim.AdamW(plain.parameters(), fused=True).step()
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = seeded(Tied)
        trainer.offload(model, job, trainer.OffloadConfig(sparse_rows=choice))
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW)
        model(tokens).square().mean().backward()
        optimizer.step()
        torch.testing.assert_close(gathered_values(model)["table.weight"], plain.table.weight.detach())


@pytest.mark.parametrize(
    ("make", "choice", "message"),
    [
        (lambda: Tagger(max_norm=1.0), True, "'table' has max_norm"),
        (Tagger, ("nothing",), "names 'nothing', which the model does not have"),
        (Tagger, ("head",), "'head' is no nn.Embedding but Linear"),
    ],
)
def test_what_cannot_gather_rows_is_refused(
    cluster: LocalCluster, job_name: str, make: object, choice: object, message: str
) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job, pytest.raises(trainer.ConfigError, match=message):
        trainer.offload(make(), job, trainer.OffloadConfig(sparse_rows=choice))


def test_an_index_out_of_range_is_an_error(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = seeded(Tagger)
        trainer.offload(model, job, trainer.OffloadConfig(sparse_rows=True))
        for wrong in (ROWS, -1):
            with pytest.raises(IndexError, match=f"index {wrong} is out of range of 'table.weight'"):
                model(torch.tensor([0, wrong]))
        assert model(torch.empty(0, dtype=torch.int64)).shape == (0, 3)


def test_indices_are_whole_numbers_as_in_torch(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        plain = seeded(Tagger)
        model = trainer.offload(seeded(Tagger), job, trainer.OffloadConfig(sparse_rows=True))
        for indices in (torch.tensor([0, 3, 3]), torch.tensor([0, 3, 3], dtype=torch.int32)):
            assert torch.equal(model(indices), plain(indices))
        for wrong in (torch.tensor([1.5]), torch.tensor([True]), torch.tensor([1], dtype=torch.int16)):
            for each in (plain, model):
                with pytest.raises(RuntimeError, match="indices"):
                    each(wrong)
