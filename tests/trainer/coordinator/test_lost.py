"""A server is lost while parameters are on their way."""

import time

import pytest
import torch

import trainer
from ps import LocalCluster
from tests.models import seeded
from tests.trainer.coordinator.observing import SlowLinks
from tests.trainer.runs import Deep, live_bytes
from trainer.offload import find

WIDTH = 64
SECONDS = 10


@pytest.mark.parametrize("backward", [False, True], ids=["in forward", "in backward"])
def test_requests_on_their_way_fail_clearly_and_leave_nothing(job_name: str, backward: bool) -> None:
    with LocalCluster(servers=2) as cluster:
        with trainer.connect(cluster.addresses, job=job_name, timeout=SECONDS) as job:
            config = trainer.OffloadConfig(param_persistence_threshold=0, prefetch_bucket_size=WIDTH * WIDTH)
            model = trainer.offload(seeded(lambda: Deep(12, WIDTH)), job, config)
            optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
            model(torch.randn(2, WIDTH)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if backward:
                loss = model(torch.randn(2, WIDTH)).sum()
                trainer.release(model)
            with SlowLinks(model) as links:
                links.hold(after=2)
                killed = []
                on_their_way = []

                def kill(*_: object) -> None:
                    if not killed:
                        killed.append(time.monotonic())
                        on_their_way.extend(links.asked[2:])
                        cluster.kill(1)
                        links.let_go()

                model.layers[6 if backward else 1].register_forward_hook(kill)
                if backward:
                    model.layers[10].weight.register_hook(kill)
                with pytest.raises(trainer.ConnectError) as raised:
                    if backward:
                        loss.backward()
                    else:
                        model(torch.randn(2, WIDTH))
                assert time.monotonic() - killed[0] < SECONDS + 6
                assert cluster.addresses[1] in str(raised.value)
                assert on_their_way
            # Whatever is tried next says so, too, and soon.
            for attempt in (lambda: model(torch.randn(2, WIDTH)), optimizer.step):
                began = time.monotonic()
                with pytest.raises(trainer.ConnectError):
                    attempt()
                assert time.monotonic() - began < SECONDS + 6
            coordinator = find(model).coordinator  # type: ignore[union-attr]
            assert not [request for request in coordinator._requests.unsettled() if not request.done]
            trainer.release(model)
            assert live_bytes(model) == coordinator.residency.live_bytes == 0
            began = time.monotonic()
        assert time.monotonic() - began < SECONDS, "closing waits for nobody"
