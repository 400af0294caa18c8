"""`trainer.report`: what gathering a model's parameters cost so far."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike

from torch import nn

from protos.sizes import format_bytes
from trainer.errors import ConfigError
from trainer.offload import OffloadedModel, find
from trainer.timeline import Timeline

_SHOWN_MODULES = 5


@dataclass(frozen=True)
class Report:
    """Counted since `trainer.offload`; bytes moved since `trainer.connect`.

    mode: "group" where the trainers move parameters together, else "direct".
    gathers: uses of parameters by modules, in forward and backward; of parameters that always stay only
        those are left out that found them.
    hits, misses: gathers that found the parameter whole or on its way, and those that had to ask for it.
    stalled_seconds: by module, how long it waited for its parameters; modules that never waited are left
        out. Module names are fully qualified, "" is the root.
    transfer_seconds: for how long parameters were on their way.
    hidden: the share of `transfer_seconds` in which the model computed, from 0 to 1.
    bytes_pulled, bytes_pushed: tensor bytes from and to the servers.
    live_bytes, live_parameters: of parameters that are resident now: whole, on their way or staged.
    peak_live_bytes, peak_live_parameters: the most there ever was at one instant.
    evictions: how often a parameter was released before its next use because others needed the room.
    surprises: how often a module came that the trace did not expect.
    repaired_traces: how many new ways through the model the traces learned of that.
    links: by server address, the kind of link in use, and why no better one is: 'grpc (shm: ...)'.
    """

    mode: str
    gathers: int
    hits: int
    misses: int
    stalled_seconds: Mapping[str, float]
    transfer_seconds: float
    hidden: float
    bytes_pulled: int
    bytes_pushed: int
    live_bytes: int
    live_parameters: int
    peak_live_bytes: int
    peak_live_parameters: int
    evictions: int
    surprises: int
    repaired_traces: int
    links: Mapping[str, str]

    @property
    def total_stalled_seconds(self) -> float:
        return sum(self.stalled_seconds.values())

    def __str__(self) -> str:
        share = self.hits / self.gathers if self.gathers else 1.0
        rows = [
            ("mode", self.mode),
            ("gathers", f"{self.gathers}, {share:.1%} asked for ahead of time"),
            ("waited for parameters", f"{self.total_stalled_seconds:.2f} s"),
            ("transfers", f"{self.transfer_seconds:.2f} s, {self.hidden:.1%} of it hidden behind compute"),
            ("pulled", format_bytes(self.bytes_pulled)),
            ("pushed", format_bytes(self.bytes_pushed)),
            ("parameters live at most", format_bytes(self.peak_live_bytes)),
            ("evicted before their next use", str(self.evictions)),
            ("traces", f"{self.surprises} surprises, {self.repaired_traces} repaired"),
        ]
        rows += [(f"link to {address}", link) for address, link in self.links.items()]
        lines = [f"{name:<30} {value}" for name, value in rows]
        longest = sorted(self.stalled_seconds.items(), key=lambda pair: -pair[1])[:_SHOWN_MODULES]
        lines += [f"  waited {seconds:8.3f} s in {module or 'the root module'}" for module, seconds in longest]
        return "\n".join(lines)


def report(model: nn.Module) -> Report:
    """What was gathered, how often that was too late, and how much memory it took. Costs next to nothing."""
    coordinator = _offloaded(model).coordinator
    statistics, residency, trace = coordinator.statistics, coordinator.residency, coordinator.forecast.trace
    transfer = coordinator.pace.total_seconds
    stalled = sum(statistics.stalled_seconds.values())
    job = _offloaded(model).job
    return Report(
        mode="direct" if _offloaded(model).group is None else "group",
        gathers=statistics.gathers,
        hits=statistics.hits,
        misses=statistics.misses,
        stalled_seconds=dict(statistics.stalled_seconds),
        transfer_seconds=transfer,
        hidden=max(0.0, 1.0 - stalled / transfer) if transfer else 1.0,
        bytes_pulled=job.stats.bytes_pulled,
        bytes_pushed=job.stats.bytes_pushed,
        live_bytes=residency.live_bytes,
        live_parameters=residency.live_elements,
        peak_live_bytes=residency.peak_bytes,
        peak_live_parameters=residency.peak_elements,
        evictions=residency.evicted,
        surprises=trace.surprises,
        repaired_traces=trace.repaired,
        links={server.address: link.describe() for server, link in zip(job.servers, job.links, strict=True)},
    )


@contextmanager
def record_timeline(model: nn.Module, path: str | PathLike[str]) -> Iterator[None]:
    """Context in which everything that happens to the model's parameters is written down.

    On leaving, `path` gets a file for Perfetto (ui.perfetto.dev) or chrome://tracing: for each module its
    forward and what it waited for, for each parameter when it was requested, arrived and was released.
    ConfigError, at once, if it cannot be written. If it cannot any more on leaving, what was raised inside
    is raised nevertheless.
    """
    offloaded_model = _offloaded(model)
    coordinator = offloaded_model.coordinator
    if coordinator.timeline is not None:
        raise ConfigError("a timeline of this model is being recorded already; end that one first")
    # An empty one: better told now than after a training.
    Timeline().write(path)
    timeline = coordinator.timeline = Timeline()
    try:
        yield
    except BaseException as raised:
        coordinator.timeline = None
        try:
            timeline.write(path)
        except ConfigError as error:
            raised.add_note(str(error))
        raise
    coordinator.timeline = None
    timeline.write(path)


def _offloaded(model: nn.Module) -> OffloadedModel:
    found = find(model)
    if found is None:
        raise ConfigError("this model is not offloaded; call trainer.offload(model, job) first")
    return found
