"""Servers are lost under a trainer that recovers: it ends with the bits of an undisturbed run."""

from collections.abc import Callable, Iterator

import pytest
from torch import nn

import trainer
from ps import LocalCluster
from tests.models import batch, loss_of, seeded
from tests.trainer.recovery.programs import Plain, adamw
from tests.trainer.runs import gathered_values

STEPS = 6


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(servers=2, lease=1) as cluster:
        yield cluster


def restart(cluster: LocalCluster, servers: list[int]) -> None:
    for server in servers:
        cluster.kill(server)
    for server in servers:
        cluster.restart(server)


class Disturbed:
    """Trains, with something happening once at a place of step 3. Every loss is that of the undisturbed run."""

    def __init__(self, cluster: LocalCluster, job: str, place: str, disturb: Callable[[], None]) -> None:
        self.rewinds: list[int] = []
        self.lost: list[trainer.ZeroPsError] = []
        self._place, self._disturb = place, disturb
        self._plain = Plain().train_to(STEPS)
        with trainer.connect(cluster.addresses, job=job, timeout=60) as connection:
            self.job = connection
            self.model = trainer.offload(seeded(type(self._plain.model)), connection)
            self.optimizer = adamw(self.model)
            self._hook(self.model.blocks[1])
            connection.commit()
            while connection.step < STEPS:
                with connection.recovering(on_rewind=self.rewinds.append, on_lost=self.lost.append, timeout=40):
                    self._step(connection.step)
            self._plain.check(gathered_values(self.model))
        assert not self._place, "it was disturbed"

    def _step(self, step: int) -> None:
        if step == 2 and self.job.complete != (2, self.job.complete[1]):
            self.job.commit()
        loss = loss_of(self.model, batch(step))
        assert loss.item() == self._plain.losses[step][0]
        loss.backward()
        self._at("before step")
        self.optimizer.step()
        self._at("after step")
        self.optimizer.zero_grad()

    def _hook(self, module: nn.Module) -> None:
        module.register_forward_hook(lambda *_: self._at("forward"))
        module.up.weight.register_hook(lambda *_: self._at("backward"))

    def _at(self, place: str) -> None:
        if place == self._place and self.job.step >= 3:
            self._place = ""
            self._disturb()


@pytest.mark.parametrize(
    ("place", "victims"), [("forward", [1]), ("backward", [0]), ("before step", [0, 1]), ("after step", [1])]
)
def test_a_server_killed_under_a_step_is_waited_for_and_costs_no_bit(
    cluster: LocalCluster, job_name: str, place: str, victims: list[int]
) -> None:
    run = Disturbed(cluster, job_name, place, lambda: restart(cluster, victims))
    # Nothing but the commits has survived.
    assert run.rewinds == [2]
    assert len(run.lost) == 1
