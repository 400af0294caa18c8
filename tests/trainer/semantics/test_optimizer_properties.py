"""What a loop does with an optimizer gives the bits of plain torch, over any number of servers."""

import itertools
import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

import trainer
from ps import LocalCluster
from tests.trainer.runs import gathered_values
from tests.trainer.semantics import script as scripts
from tests.trainer.semantics.script import Script

THOROUGH = int(os.environ.get("ZERO_PS_EXAMPLES", "0"))
"""Examples of each property, in place of the few that find most of what there is."""

CLUSTERS = [(1, None), (3, None), (2, "64MiB")] + ([(2, None), (4, None), (4, "64MiB")] if THOROUGH else [])
"""Servers, and the memory of each."""

_jobs = itertools.count()
_settings = settings(
    max_examples=THOROUGH or 12,
    deadline=None,
    derandomize=not THOROUGH,
    database=None,
    # To shrink an example takes minutes of starting jobs.
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module", params=CLUSTERS, ids=lambda param: f"{param[0]}-{param[1] or 'memory'}")
def servers(request: pytest.FixtureRequest) -> Iterator[LocalCluster]:
    with LocalCluster(request.param[0], memory=request.param[1]) as cluster:
        yield cluster


def train(script: Script, cluster: LocalCluster) -> tuple[list[float], dict[str, torch.Tensor]]:
    with ExitStack() as stack:
        job = stack.enter_context(
            trainer.connect(cluster.addresses, job=f"property{next(_jobs)}", rank=0, world_size=1)
        )
        model = scripts.build(script)
        trainer.offload(model, job)
        optimizer = trainer.RemoteOptimizer(
            scripts.param_groups(script, model),
            getattr(torch.optim, script.class_name),
            **scripts.options(script),
        )
        clip = {"norm": trainer.clip_grad_norm_, "value": trainer.clip_grad_value_}
        shown = scripts.run(script, model, optimizer, clip)
        return shown, gathered_values(model)


def check(script: Script, cluster: LocalCluster) -> None:
    expected, params, _ = scripts.plain(script)
    shown, actual = train(script, cluster)
    assert shown == expected
    for name, value in params.items():
        assert torch.equal(actual[name], value), name


@given(script=scripts.scripts())
@_settings
def test_any_loop_gives_the_bits_of_plain_torch(servers: LocalCluster, script: Script) -> None:
    check(script, servers)


@pytest.mark.parametrize("name", scripts.ALL_CLASSES)
def test_every_class_gives_them_for_what_is_in_several_chunks(servers: LocalCluster, name: str) -> None:
    @given(script=scripts.scripts(name, large=True))
    @settings(_settings, max_examples=max(1, THOROUGH // 10))
    def run(script: Script) -> None:
        check(script, servers)

    run()
