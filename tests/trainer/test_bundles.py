"""Small gradients share requests, and nobody waits for one that has not been sent."""

from concurrent.futures import Future

import pytest
import torch
from torch import nn

import trainer
from ps import LocalCluster
from tests.models import seeded
from trainer.bundle import BUNDLE_BYTES, Bundle
from trainer.links import Push, PushKind


def gradient(chunk: int, nbytes: int = 100, **terms: object) -> Push:
    source = torch.full((nbytes,), chunk, dtype=torch.uint8)
    kind = terms.pop("kind", PushKind.GRADIENT)
    return Push(kind, 3, [(chunk, 0)], [source], torch.float32, **terms)  # type: ignore[arg-type]


def test_what_is_bundled_is_one_request_in_order_and_all_hear_of_its_end() -> None:
    bundle = Bundle()
    heard: list[int] = []
    for chunk in range(3):
        assert bundle.takes(gradient(chunk))
        bundle.add(gradient(chunk), lambda future, chunk=chunk: heard.append(chunk))
    taken = bundle.take()
    assert taken is not None
    push, done = taken
    assert push.chunks == [(0, 0), (1, 0), (2, 0)]
    assert [int(source[0]) for source in push.sources] == [0, 1, 2]
    done(Future())
    assert heard == [0, 1, 2]
    assert bundle.take() is None


@pytest.mark.parametrize(
    "other",
    [
        gradient(1, sequence=1),
        gradient(1, final=True),
        gradient(1, runs=[[(0, 25)]]),
        gradient(1, kind=PushKind.WEIGHT),
        gradient(1, BUNDLE_BYTES - 100),
    ],
    ids=["sequence", "final", "rows", "weight", "large"],
)
def test_what_a_request_cannot_say_for_all_of_them_does_not_join(other: Push) -> None:
    bundle = Bundle()
    bundle.add(gradient(0), lambda future: None)
    assert not bundle.takes(other)


class Wide(nn.Module):
    """Small gradients before, between and behind large ones."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            layer for _ in range(6) for layer in (nn.Linear(24, 24), nn.LayerNorm(24), nn.Linear(24, 24, bias=False))
        )
        self.large = nn.ModuleList([nn.Linear(24, 900), nn.Linear(900, 24)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:9]:
            x = x + layer(x)
        x = x + self.large[1](torch.relu(self.large[0](x)))
        for layer in self.layers[9:]:
            x = x + layer(x)
        return x


def pushes_of(job: trainer.Job) -> list[Push]:
    """Every request that goes out from here on."""
    found: list[Push] = []
    for link in job.links:

        def push(push: Push, real: object = link.push) -> "Future[None]":
            found.append(push)
            return real(push)  # type: ignore[operator, no-any-return]

        link.push = push  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize("early", [False, True], ids=["at the step", "during backward"])
@pytest.mark.parametrize("link", ["grpc", "shm"])
def test_small_gradients_share_requests_and_give_the_bits_of_plain_torch(
    cluster: LocalCluster, job_name: str, link: str, early: bool
) -> None:
    """Two micro-batches; one of them dropped in between, and begun anew."""
    plain = seeded(Wide)
    expected = torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True)
    data = torch.randn(4, 5, 24, generator=torch.Generator().manual_seed(1))
    with trainer.connect(cluster.addresses, job=job_name, links=[link], timeout=60) as job:
        model = trainer.offload(seeded(Wide), job)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)
        sent = pushes_of(job)
        for step in range(3):
            model(data[3]).square().mean().backward()
            optimizer.zero_grad()
            for each in (model, plain):
                each(data[step]).square().mean().backward()
            assert torch.equal(model(data[3]), plain(data[3]))
            if early:
                with optimizer.last_backward():
                    model(data[3]).square().mean().backward()
            else:
                model(data[3]).square().mean().backward()
            plain(data[3]).square().mean().backward()
            for one in (optimizer, expected):
                one.step()
                one.zero_grad()
        parameters = len(list(model.parameters()))
        with trainer.gathered(model.parameters()):
            assert all(map(torch.equal, model.parameters(), plain.parameters()))
    assert sum(len(push.chunks) for push in sent) == 9 * parameters
    final = [push for push in sent if push.final]
    assert all(len(push.chunks) == 1 for push in final), "servers are not kept waiting for what they may use at once"
    assert bool(final) == early
    assert len(sent) - len(final) < (9 * parameters - len(final)) / 3
