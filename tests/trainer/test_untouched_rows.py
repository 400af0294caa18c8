"""`OffloadConfig(untouched_rows="keep")`: a step leaves rows alone that no batch named, as `torch.optim.SparseAdam`."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import nn

import trainer
from ps import LocalCluster
from tests.models import seeded
from tests.ranks import run_ranks
from tests.trainer.runs import gathered_values

WIDTH = 320


class Tables(nn.Module):
    def __init__(self, *rows: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(each, WIDTH) for each in rows)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(sum(table(tokens % table.num_embeddings) for table in self.tables))


ONE_TABLE = (9000,)
"""Three chunks."""

SEVERAL = (300, 301, 302, 303, 304, 305)


class PlainRows:
    """What is meant, in plain torch: the class steps the rows that have a gradient as a tensor of their own."""

    def __init__(self, model: Tables, cls: type[torch.optim.Optimizer], **options: object) -> None:
        self._model, self._cls, self._options = model, cls, options
        self._head = cls(model.head.parameters(), **options)
        self._state: list[dict[str, torch.Tensor]] = [{} for _ in model.tables]

    def step(self, tokens: Sequence[torch.Tensor]) -> None:
        self._head.step()
        for table, state in zip(self._model.tables, self._state, strict=True):
            weight, gradient = table.weight.detach(), table.weight.grad
            rows = torch.unique(torch.cat([each.flatten() for each in tokens]) % len(weight))
            some = weight[rows]
            some.grad = gradient[rows]
            optimizer = self._cls([some], **self._options)
            optimizer.state[some] = {
                name: value[rows] if value.dim() else value for name, value in state.items() if len(rows)
            }
            optimizer.step()
            weight[rows] = some
            for name, value in optimizer.state[some].items():
                if torch.is_tensor(value):
                    whole = state.setdefault(name, torch.zeros_like(weight) if value.dim() else value)
                    if value.dim():
                        whole[rows] = value
                    else:
                        state[name] = value
        self._model.zero_grad()


@pytest.fixture(scope="module")
def servers() -> Iterator[LocalCluster]:
    """One for each chunk of the large table."""
    with LocalCluster(3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with LocalCluster(1, data_dir=tmp_path_factory.mktemp("limited"), memory="6MiB") as cluster:
        yield cluster


def tokens_of(step: int) -> torch.Tensor:
    """Two micro-batches; rows of the last two chunks come later than those of the first, and then pause."""
    tokens = torch.randint(0, (3000, 9000, 50, 6000)[step % 4], (2, 16), generator=torch.Generator().manual_seed(step))
    tokens[0, :3] = 7
    return tokens


def offloaded(model: nn.Module, job: trainer.Job, **config: object) -> nn.Module:
    return trainer.offload(model, job, trainer.OffloadConfig(sparse_rows=True, untouched_rows="keep", **config))


@pytest.mark.parametrize(
    ("where", "rows", "cls", "options"),
    [
        ("servers", ONE_TABLE, torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": True, "fused": True}),
        ("servers", SEVERAL, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "fused": True}),
        ("servers", SEVERAL, torch.optim.RMSprop, {"lr": 1e-2, "centered": True}),
        ("limited", SEVERAL, torch.optim.Adam, {"lr": 1e-2, "fused": True}),
    ],
)
def test_rows_that_no_batch_names_keep_weight_and_moments(
    request: pytest.FixtureRequest,
    job_name: str,
    where: str,
    rows: tuple[int, ...],
    cls: type[torch.optim.Optimizer],
    options: dict[str, object],
) -> None:
    """Through a commit and another session, too, of a limited server through a restart."""
    cluster: LocalCluster = request.getfixturevalue(where)
    plain = seeded(lambda: Tables(*rows))
    reference = PlainRows(plain, cls, **options)
    for first, last in ((0, 3), (3, 6)):
        with trainer.connect(cluster.addresses, job=job_name) as job:
            model = offloaded(seeded(lambda: Tables(*rows)), job)
            optimizer = trainer.RemoteOptimizer(model.parameters(), cls, **options)
            for step in range(first, last):
                for half in tokens_of(step):
                    output = model(half)
                    output.square().mean().backward()
                    expected = plain(half)
                    expected.square().mean().backward()
                    assert torch.equal(output, expected), step
                optimizer.step()
                optimizer.zero_grad()
                reference.step(tokens_of(step))
            job.commit()
            values = gathered_values(model)
        if where == "limited":
            cluster.restart(0)
    for name, value in plain.named_parameters():
        assert torch.equal(values[name], value), name


def test_it_is_sparse_adam_within_rounding(servers: LocalCluster, job_name: str) -> None:
    """Which adds eps before it corrects the bias, so that with a large one the two are not the same."""
    plain = seeded(lambda: Tables(*ONE_TABLE))
    plain.tables[0].sparse = True
    sparse = torch.optim.SparseAdam(plain.tables.parameters(), lr=1e-2, eps=1e-12)
    head = torch.optim.Adam(plain.head.parameters(), lr=1e-2, eps=1e-12)
    with trainer.connect(servers.addresses, job=job_name) as job:
        model = offloaded(seeded(lambda: Tables(*ONE_TABLE)), job)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.Adam, lr=1e-2, eps=1e-12)
        for step in range(4):
            for each, optimizers in ((model, [optimizer]), (plain, [sparse, head])):
                each(tokens_of(step)).square().mean().backward()
                for one in optimizers:
                    one.step()
                    one.zero_grad()
        values = gathered_values(model)
    for name, value in plain.named_parameters():
        torch.testing.assert_close(values[name], value.detach(), rtol=1e-4, atol=1e-5)


def test_rows_that_another_trainer_names_are_stepped(cluster: LocalCluster, job_name: str) -> None:
    run = {"function": "trainer.test_untouched_rows:train_half", "addresses": cluster.addresses, "world_size": 2}
    ranks = run_ranks(**run, job=job_name)
    plain = seeded(lambda: Tables(*ONE_TABLE))
    reference = PlainRows(plain, torch.optim.Adam, lr=1e-2, fused=True)
    for step in range(3):
        for half in tokens_of(step):
            (plain(half).square().mean() / 2).backward()
        reference.step(tokens_of(step))
    for name, value in plain.named_parameters():
        torch.testing.assert_close(ranks[0][name], value.detach(), rtol=1e-5, atol=1e-6)
    untouched = torch.ones(9000, dtype=torch.bool)
    untouched[torch.cat([tokens_of(step).flatten() for step in range(3)])] = False
    before = seeded(lambda: Tables(*ONE_TABLE)).tables[0].weight.detach()
    assert torch.equal(ranks[0]["tables.0.weight"][untouched], before[untouched])


def train_half(addresses: list[str], job: str) -> dict[str, torch.Tensor]:
    """Trains on the rows of tokens that are this rank's."""
    with trainer.connect(addresses, job=job) as connection:
        model = offloaded(seeded(lambda: Tables(*ONE_TABLE)), connection)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.Adam, lr=1e-2)
        for step in range(3):
            model(tokens_of(step)[connection.rank]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return gathered_values(model)


def test_gradients_that_were_dropped_name_no_rows(servers: LocalCluster, job_name: str) -> None:
    plain = seeded(lambda: Tables(*ONE_TABLE))
    with trainer.connect(servers.addresses, job=job_name) as job:
        model = offloaded(seeded(lambda: Tables(*ONE_TABLE)), job)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2, weight_decay=0.5)
        model(torch.tensor([1, 8000])).sum().backward()
        optimizer.zero_grad(set_to_none=False)
        model(torch.tensor([2])).sum().backward()
        optimizer.step()
        table = gathered_values(model)["tables.0.weight"]
    changed = (table != plain.tables[0].weight.detach()).any(dim=1).nonzero().flatten()
    assert changed.tolist() == [2]


def test_a_table_used_as_a_whole_is_stepped_as_a_whole(servers: LocalCluster, job_name: str) -> None:
    plain = seeded(lambda: Tables(300))
    with trainer.connect(servers.addresses, job=job_name) as job:
        model = offloaded(seeded(lambda: Tables(300)), job)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2, weight_decay=0.5)
        with trainer.gathered(model.tables.parameters()):
            (model(torch.tensor([1])).sum() + model.tables[0].weight[5].sum()).backward()
        optimizer.step()
        table = gathered_values(model)["tables.0.weight"]
    assert (table != plain.tables[0].weight.detach()).any(dim=1).all()


def test_trainers_have_to_agree(servers: LocalCluster, job_name: str) -> None:
    run = {"function": "trainer.test_untouched_rows:disagree", "addresses": servers.addresses, "world_size": 2}
    messages = run_ranks(**run, job=job_name)
    assert any("disagree on the parameters with untouched_rows='keep'" in message for message in messages)


def disagree(addresses: list[str], job: str) -> str:
    with trainer.connect(addresses, job=job, timeout=20) as connection:
        config = trainer.OffloadConfig(sparse_rows=True, untouched_rows=("keep", "step")[connection.rank])
        model = trainer.offload(seeded(lambda: Tables(50)), connection, config)
        try:
            trainer.RemoteOptimizer(model.parameters(), torch.optim.Adam)
        except trainer.ZeroPsError as error:
            return str(error)
        finally:
            connection.barrier("stated")
        return ""


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(trainer.ConfigError, match="there are none; name them with sparse_rows"):
        trainer.OffloadConfig(untouched_rows="keep")
    with pytest.raises(trainer.ConfigError, match="has to be 'step' or 'keep', not 'leave'"):
        trainer.OffloadConfig(sparse_rows=True, untouched_rows="leave")
