"""Whatever a model does and however little may be resident, results are those of plain torch."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import trainer
from ps import LocalCluster
from tests.trainer.coordinator.observing import Observer
from tests.trainer.coordinator.programs import SCRIPTS, SPECS, Script, Spec, make, run_script
from tests.trainer.lifecycle.comparing import assert_equal, nothing_gathered

SECONDS = 20
"""After so long a wait is a deadlock."""

JOBS = 200
"""So many jobs a set of servers takes, with some to spare."""


class _Jobs:
    """Addresses of servers and the name of a job, as many as hypothesis wants."""

    def __init__(self) -> None:
        self._number = 0
        self._cluster: LocalCluster | None = None

    def new(self) -> tuple[list[str], str]:
        if self._cluster is None or self._number % JOBS == 0:
            self.close()
            self._cluster = LocalCluster(servers=2)
        self._number += 1
        return self._cluster.addresses, f"program{self._number}"

    def close(self) -> None:
        if self._cluster is not None:
            self._cluster.close()


@pytest.fixture(scope="module")
def jobs() -> Iterator[_Jobs]:
    jobs = _Jobs()
    yield jobs
    jobs.close()


def _plain(spec: Spec, script: Script) -> tuple[list[Any], dict[str, torch.Tensor]]:
    model = make(spec)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
    torch.manual_seed(7)
    return run_script(model, optimizer, script), {name: p.detach() for name, p in model.named_parameters()}


def _offloaded(
    jobs: _Jobs, spec: Spec, script: Script, config: trainer.OffloadConfig
) -> tuple[list[Any], dict[str, torch.Tensor], trainer.Report]:
    addresses, name = jobs.new()
    with trainer.connect(addresses, job=name, timeout=SECONDS) as job:
        model = trainer.offload(make(spec), job, config)
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = trainer.RemoteOptimizer(params, torch.optim.AdamW, lr=1e-2)
        torch.manual_seed(7)
        with Observer(model) as observer:
            results = run_script(model, optimizer, script)
            loss = model(torch.randn(3, 6)).sum()
            loss.backward()
            persistent = max((p.numel() for p in params), default=0) if config.param_persistence_threshold else 0
            nothing_gathered(model, but=persistent)
            optimizer.zero_grad()
            values = {}
            for key, param in model.named_parameters():
                with trainer.gathered(param):
                    values[key] = param.detach().clone()
        report = trainer.report(model)
        assert report.live_bytes <= observer.peak_bytes <= report.peak_live_bytes
        assert report.gathers == report.hits + report.misses
        return results, values, report


@given(spec=SPECS, script=SCRIPTS, more=st.sampled_from([0, 0, 1, 64, 500]), buckets=st.sampled_from([1, 40, 10**6]))
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
def test_results_do_not_depend_on_what_is_asked_ahead_or_how_much_may_stay(
    jobs: _Jobs, spec: Spec, script: Script, more: int, buckets: int
) -> None:
    expected, params = _plain(spec, script)

    def check(**settings: Any) -> trainer.Report:
        settings = {"param_persistence_threshold": 0, **settings}
        results, values, report = _offloaded(jobs, spec, script, trainer.OffloadConfig(**settings))
        assert_equal(results, expected)
        assert_equal(values, params)
        return report

    # What is in use at once, and not a byte of anything else.
    report = check(prefetch_bucket_size=0, max_reuse_distance=0)
    least, elements = report.peak_live_bytes, report.peak_live_parameters
    check()
    check(prefetch_bucket_size=buckets, max_live_bytes=least + more)
    check(prefetch_bucket_size=buckets, max_live_parameters=elements + more // 4, max_reuse_distance=100)
    check(param_persistence_threshold=30, prefetch_bucket_size=buckets)
