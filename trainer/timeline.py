"""What the coordinator did and when, as a timeline for Perfetto or chrome://tracing.

The file is the Trace Event Format, "JSON Object Format": complete events ("X") for what one thread does,
asynchronous ones ("b", "e") for what goes on beside it, and counters ("C").
"""

import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError
from trainer.parameter import OffloadedParameter

MAX_EVENTS = 1 << 21
"""After so many events a timeline takes no more; it would be too large to look at."""

_THREADS = {"modules": 1, "waiting": 2}


class Timeline:
    """Collects events. Methods may be called from several threads; each event costs about a microsecond.

    Times are of `time.perf_counter`, in seconds.
    """

    def __init__(self) -> None:
        self.began_at = time.perf_counter()
        # Kind, name, time, duration or 0, and what there is to say about it.
        self._events: list[tuple[str, str, float, float, Any]] = []
        self.left_out = 0

    def requested(self, states: Sequence[OffloadedParameter], asked_at: float, *, urgent: bool) -> None:
        """Parameters were asked for. urgent: a module waits for them."""
        for state in states:
            self._add("request begins", state.name, asked_at, 0.0, {"bytes": state.nbytes, "urgent": urgent})

    def arrived(self, states: Sequence[OffloadedParameter], arrived_at: float) -> None:
        """All bytes are here."""
        for state in states:
            self._add("request ends", state.name, arrived_at, 0.0, None)
            self._add("resident begins", state.name, arrived_at, 0.0, {"bytes": state.nbytes})

    def used(self, states: Sequence[OffloadedParameter], module: str, at: float) -> None:
        """A module uses parameters."""
        if states:
            self._add("used", module, at, 0.0, {"parameters": [state.name for state in states]})

    def waited(self, module: str, began_at: float, ended_at: float) -> None:
        """A module waited for parameters."""
        self._add("waiting", module, began_at, ended_at - began_at, None)

    def ran(self, module: str, began_at: float, ended_at: float) -> None:
        """A module's forward."""
        self._add("modules", module, began_at, ended_at - began_at, None)

    def released(self, state: OffloadedParameter, live_bytes: int) -> None:
        """A parameter gave its memory back; so many bytes are left."""
        now = time.perf_counter()
        self._add("resident ends", state.name, now, 0.0, None)
        self._add("live", "live bytes", now, 0.0, live_bytes)

    def live(self, live_bytes: int) -> None:
        """So many bytes are resident."""
        self._add("live", "live bytes", time.perf_counter(), 0.0, live_bytes)

    def _add(self, kind: str, name: str, at: float, seconds: float, what: Any) -> None:
        if len(self._events) < MAX_EVENTS:
            self._events.append((kind, name, at, seconds, what))
        else:
            self.left_out += 1

    # ------------------------------------------------------------ file

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the file; ConfigError, naming it, where it cannot be written."""
        pid = os.getpid()
        try:
            with Path(path).open("w") as file:
                file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
                for thread, number in _THREADS.items():
                    named = {"name": "thread_name", "ph": "M", "pid": pid, "tid": number, "args": {"name": thread}}
                    file.write(json.dumps(named) + ",\n")
                named = {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": "zero-ps trainer"}}
                file.write(json.dumps(named))
                for event in self._encoded(pid):
                    file.write(",\n" + json.dumps(event))
                file.write(f'\n], "otherData": {{"events_left_out": {self.left_out}}}}}\n')
        except OSError as error:
            raise ConfigError(f"cannot write the timeline to {path}: {error.strerror}; choose another path") from None

    def _encoded(self, pid: int) -> Iterable[dict[str, Any]]:
        ended_at = time.perf_counter()
        open_spans = _Spans()
        for kind, name, at, seconds, what in sorted(self._events, key=lambda event: event[2]):
            event: dict[str, Any] = {"name": name, "pid": pid, "ts": self._microseconds(at)}
            if kind in _THREADS:
                yield {**event, "ph": "X", "cat": kind, "tid": _THREADS[kind], "dur": round(seconds * 1e6, 3)}
            elif kind == "used":
                yield {**event, "ph": "i", "s": "t", "cat": kind, "tid": _THREADS["modules"], "args": what}
            elif kind == "live":
                yield {**event, "ph": "C", "args": {"bytes": what}}
            else:
                yield from open_spans.edge(kind, event, what)
        yield from open_spans.close({"pid": pid, "ts": self._microseconds(ended_at)})

    def _microseconds(self, at: float) -> float:
        return max(0.0, round((at - self.began_at) * 1e6, 3))


class _Spans:
    """Makes pairs of what begins and ends.

    A request that was taken back does not arrive, what is refreshed is resident all along, and some things
    have begun before the timeline did or end after it.
    """

    def __init__(self) -> None:
        self._open: dict[tuple[str, str], None] = {}

    def edge(self, kind: str, event: dict[str, Any], what: Any) -> Iterable[dict[str, Any]]:
        category, _, edge = kind.partition(" ")
        span = category, event["name"]
        if edge == "begins":
            if span not in self._open:
                self._open[span] = None
                yield {**event, **_ends(span, "b"), **({"args": what} if what else {})}
            return
        taken_back = category == "resident" and ("request", event["name"]) in self._open
        if taken_back:
            yield from self._end(("request", event["name"]), event)
        if span not in self._open and not taken_back:
            yield {**event, **_ends(span, "b"), "ts": 0.0}
            self._open[span] = None
        if span in self._open:
            yield from self._end(span, event)

    def close(self, event: dict[str, Any]) -> Iterable[dict[str, Any]]:
        for span in list(self._open):
            yield from self._end(span, {"name": span[1], **event})

    def _end(self, span: tuple[str, str], event: dict[str, Any]) -> Iterable[dict[str, Any]]:
        del self._open[span]
        yield {**event, **_ends(span, "e")}


def _ends(span: tuple[str, str], phase: str) -> dict[str, Any]:
    category, name = span
    return {"ph": phase, "cat": category, "id": f"{category} {name}", "tid": 0}
