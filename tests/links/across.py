"""What a trainer on another host than its servers does in the tests of namespaces (see `tests.ranks`)."""

import time
from typing import Any

import psutil
import torch

import trainer
from tests.models import Residual, batch, loss_of, seeded
from tests.trainer.runs import adamw, gathered_values


def train(addresses: list[str], job: str, links: list[str] | None) -> dict[str, Any]:
    with trainer.connect(addresses, job=job, links=links, connect_timeout=30) as connection:
        model = seeded(Residual)
        trainer.offload(model, connection)
        optimizer = adamw(model.parameters())
        for step in range(3):
            loss_of(model, batch(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        values = gathered_values(model)
        return {"links": [link.kind for link in connection.links], "params": values}


def listening(addresses: list[str], job: str, links: list[str]) -> dict[str, Any]:
    """The link to a server, why it is no better one, and at which addresses this process is connected to others."""
    with trainer.connect(addresses, job=job, links=links, connect_timeout=60) as connection:
        (link,) = connection.links
        peers = {each.raddr.ip for each in psutil.Process().net_connections() if each.raddr}
        return {"link": link.kind, "not_chosen": dict(link.not_chosen), "peers": peers}


def train_until_the_cable_is_cut(addresses: list[str], job: str, links: list[str], timeout: float) -> dict[str, Any]:
    """Returns the error, and how long the step took that it ended."""
    with trainer.connect(addresses, job=job, links=links, connect_timeout=30, timeout=timeout) as connection:
        # Large enough to be on its way when the cable is cut.
        model = torch.nn.Sequential(*[torch.nn.Linear(2048, 2048) for _ in range(4)])
        trainer.offload(model, connection, trainer.OffloadConfig(max_reuse_distance=0))
        optimizer = adamw(model.parameters())
        began = time.monotonic()
        try:
            for step in range(10_000):
                began = time.monotonic()
                model(torch.ones(1, 2048)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                if step == 0:
                    print("training", flush=True)
            return {"error": "none", "seconds": 0.0}
        except trainer.ZeroPsError as error:
            return {"error": f"{type(error).__name__}: {error}", "seconds": time.monotonic() - began}
