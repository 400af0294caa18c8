"""What people and servers get to see: reports, timelines, names in the profiler, plans."""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trainer
from ps import LocalCluster
from ps.options import ServerOptions
from ps.plan import Plan, PlannedUse
from ps.schedule import Schedule
from ps.server import ServeOptions, Server
from ps.store import DataDir
from tests.models import seeded
from tests.trainer.coordinator.test_ahead import NOTHING_STAYS, Ways
from tests.trainer.lifecycle.comparing import step
from tests.trainer.runs import Deep
from trainer.offload import find

WIDTH = 16


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 1) -> None:
    for _ in range(count):
        model(torch.randn(3, WIDTH)).square().sum().backward()
        step(optimizer)


@pytest.fixture
def model(cluster: LocalCluster, job_name: str) -> Iterator[nn.Module]:
    with trainer.connect(cluster.addresses, job=job_name, timeout=20) as job:
        yield trainer.offload(seeded(Ways), job, trainer.OffloadConfig(param_persistence_threshold=0))


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.01)


# ---------------------------------------------------------------- reports


def test_the_numbers_of_a_report_add_up(model: nn.Module) -> None:
    new = trainer.report(model)
    assert new.gathers == new.live_bytes == new.peak_live_bytes == new.surprises == 0
    assert new.hidden == 1.0
    assert "gathers" in str(new)
    optimizer = _sgd(model)
    _train(model, optimizer, 3)
    report = trainer.report(model)
    # Weight and bias of 14 layers in forward; in backward the weights of all but the first.
    assert report.gathers == report.hits + report.misses == 3 * (2 * 14 + 13)
    assert set(report.stalled_seconds) <= {name for name, _ in model.named_modules()}
    assert report.total_stalled_seconds == pytest.approx(sum(report.stalled_seconds.values()))
    assert 0 <= report.hidden <= 1
    used = 14 * 4 * (WIDTH * WIDTH + WIDTH)
    assert report.bytes_pulled >= 3 * used
    assert report.bytes_pushed == 20 * 4 * (WIDTH * WIDTH + WIDTH) + 3 * used, "values once, then gradients"
    assert report.live_bytes == report.live_parameters == 0
    assert report.peak_live_bytes == 4 * report.peak_live_parameters <= 20 * 4 * (WIDTH * WIDTH + WIDTH)
    text = str(report)
    for word in (str(report.gathers), "ahead of time", "KiB", "surprises"):
        assert word in text
    assert all(len(line) < 100 for line in text.splitlines())


def test_a_report_of_what_is_not_offloaded_is_refused() -> None:
    with pytest.raises(trainer.ConfigError, match=r"trainer\.offload"):
        trainer.report(nn.Linear(2, 2))


# ---------------------------------------------------------------- timelines


def _intervals(events: list[dict[str, Any]], category: str) -> dict[str, list[tuple[float, float]]]:
    """By parameter, from begin to end; asserts that the two alternate."""
    intervals: dict[str, list[tuple[float, float]]] = defaultdict(list)
    begun: dict[str, float] = {}
    for event in (event for event in events if event.get("cat") == category):
        name = event["name"]
        if event["ph"] == "b":
            assert name not in begun, f"{category} of {name} begins twice"
            begun[name] = event["ts"]
        else:
            assert event["ph"] == "e"
            assert name in begun, f"{category} of {name} ends without having begun"
            intervals[name].append((begun.pop(name), event["ts"]))
            assert intervals[name][-1][0] <= event["ts"]
            assert len(intervals[name]) == 1 or intervals[name][-2][1] <= intervals[name][-1][0]
    assert not begun, f"{category} never ends: {begun}"
    return intervals


@pytest.mark.parametrize(
    "config",
    [
        NOTHING_STAYS,
        trainer.OffloadConfig(param_persistence_threshold=20),
        trainer.OffloadConfig(param_persistence_threshold=0, max_live_bytes=4 * 4 * WIDTH * (WIDTH + 1)),
    ],
    ids=["nothing stays", "some persistent", "tight"],
)
def test_a_timeline_is_in_the_trace_event_format(
    cluster: LocalCluster, job_name: str, tmp_path: Path, config: trainer.OffloadConfig
) -> None:
    with trainer.connect(cluster.addresses, job=job_name, timeout=20) as job:
        model: Any = trainer.offload(seeded(Ways), job, config)
        optimizer = _sgd(model)
        _train(model, optimizer)
        # Something is resident and something on its way when it begins, and when it ends.
        loss = model(torch.randn(3, WIDTH)).sum()
        with trainer.record_timeline(model, tmp_path / "timeline.json"):
            loss.backward()
            step(optimizer)
            for way in (1, 0, 1):
                model.way = way
                _train(model, optimizer)
            loss = model(torch.randn(3, WIDTH)).sum()
        loss.backward()
        names = {name for name, _ in model.named_parameters()}
    written = json.loads((tmp_path / "timeline.json").read_text())
    events = written["traceEvents"]
    assert written["otherData"]["events_left_out"] == 0
    for event in events:
        assert isinstance(event["name"], str) and isinstance(event["pid"], int)
        assert event["ph"] in "MXibeC"
        if event["ph"] != "M":
            assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
        if event["ph"] in "be":
            assert event["id"] and event["cat"]
    requests, resident = _intervals(events, "request"), _intervals(events, "resident")
    assert set(requests) <= names and set(resident) <= names
    assert len(requests) > 20 and len(resident) > 20
    modules = {event["name"] for event in events if event.get("cat") == "modules"}
    assert {"", "layers.19", "layers.13", "layers.5"} <= modules
    used = [name for e in events if e.get("cat") == "used" for name in e["args"]["parameters"]]
    assert set(used) <= names
    live = [event["args"]["bytes"] for event in events if event["name"] == "live bytes"]
    assert min(live) >= 0
    assert max(live) <= (config.max_live_bytes or 10**6)


def test_a_timeline_that_cannot_be_written_says_so(model: nn.Module, tmp_path: Path) -> None:
    nowhere, second = tmp_path / "no-such-folder" / "timeline.json", tmp_path / "second.json"
    with pytest.raises(trainer.ConfigError, match="no-such-folder"), trainer.record_timeline(model, nowhere):
        pytest.fail("said too late")
    nowhere.parent.mkdir()
    with pytest.raises(RuntimeError, match="ended") as raised, trainer.record_timeline(model, nowhere):
        nowhere.unlink()
        nowhere.parent.rmdir()
        raise RuntimeError("the training ended")
    assert "no-such-folder" in raised.value.__notes__[0], "what ended the training is not lost for it"
    with trainer.record_timeline(model, tmp_path / "timeline.json"):
        with pytest.raises(trainer.ConfigError, match="already"), trainer.record_timeline(model, second):
            pass
        _train(model, _sgd(model))
    assert json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]


def test_the_profiler_of_torch_shows_gathers(model: nn.Module) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        _train(model, _sgd(model))
    names = {event.key for event in profile.key_averages()}
    assert "zero-ps gather layers.19" in names


# ---------------------------------------------------------------- plans


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[list[Server]]:
    """Two servers in this process, to look into."""
    servers = []
    for index in range(2):
        options = ServerOptions(index=index, num_shards=2)
        data_dir = DataDir(tmp_path / str(index), index, 2)
        servers.append(Server(ServeOptions(options, tmp_path / str(index), "127.0.0.1:0", threads=1), data_dir))
        servers[-1].start()
    yield servers
    for server in servers:
        server.stop(1.0)


def test_every_server_learns_the_order_of_use(servers: list[Server], monkeypatch: pytest.MonkeyPatch) -> None:
    learned: dict[Schedule, Plan] = {}
    follow = Schedule.follow

    def record(schedule: Schedule, plan: Plan, chunks_of: Any) -> None:
        learned[schedule] = plan
        follow(schedule, plan, chunks_of)

    monkeypatch.setattr(Schedule, "follow", record)

    def plans() -> list[list[PlannedUse]]:
        """Of the only job, by server, as soon as what was sent has been answered."""
        for call in find(model).coordinator._plan._calls:  # type: ignore[union-attr]
            call.result()
        return [[*plan.uses] for plan in learned.values()]

    with trainer.connect([server.address for server in servers], job="job", timeout=20) as job:
        sent = []
        for server in job.servers:
            start = server.start
            monkeypatch.setattr(
                server, "start", lambda method, *a, start=start: sent.append(method) or start(method, *a)
            )
        model: Any = trainer.offload(seeded(lambda: Deep(4, WIDTH)), job, NOTHING_STAYS)
        index = {name: i for i, (name, _) in enumerate(model.named_parameters())}
        assert [index[f"layers.{layer}.weight"] for layer in range(4)] == [0, 1, 2, 3]
        optimizer = _sgd(model)
        _train(model, optimizer, 3)
        forward = [PlannedUse("pull", layer) for layer in range(4)]
        backward = [use for layer in (3, 2, 1) for use in (PlannedUse("pull", layer), PlannedUse("gradient", layer))]
        expected = [*forward, *backward, PlannedUse("gradient", 0)]
        for plan in plans():
            assert sorted(map(repr, plan)) == sorted(map(repr, expected))
            assert plan[:4] == forward
            gradients = [use.parameter for use in plan if use.kind == "gradient"]
            assert gradients == [3, 2, 1, 0]
        assert len(plans()) == 2
        count = sent.count("Plan")
        _train(model, optimizer, 5)
        assert sent.count("Plan") == count, "nothing changed"
        # What changes is sent.
        with torch.no_grad():
            model(torch.randn(2, WIDTH))
        assert plans() == [forward, forward]
