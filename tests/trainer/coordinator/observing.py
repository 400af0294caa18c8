"""Watches what is resident of an offloaded model, whenever that changes."""

import functools
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any

from torch import nn

from tests.trainer.runs import live_bytes
from trainer.offload import find
from trainer.transfer import Arrival, Destination


class Observer:
    """Checks at every change of memory that what is counted is what there is, and within the limits.

    peak_bytes: the most that there really was. `checks`: how often that was looked at.
    """

    def __init__(self, model: nn.Module) -> None:
        offloaded = find(model)
        assert offloaded is not None
        self.model = model
        self.residency = offloaded.coordinator.residency
        self.peak_bytes = 0
        self.checks = 0
        self.wrong: list[str] = []

    def __enter__(self) -> "Observer":
        self._allocate, self._free = self.residency.allocate, self.residency.free
        self.residency.allocate = self._after(self._allocate)  # type: ignore[method-assign]
        self.residency.free = self._after(self._free)  # type: ignore[method-assign]
        self._handles = [
            handle
            for module in self.model.modules()
            for handle in (
                module.register_forward_pre_hook(lambda *_: self.check("in a forward")),
                module.register_forward_hook(lambda *_: self.check("after a forward")),
            )
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        del self.residency.allocate, self.residency.free
        for handle in self._handles:
            handle.remove()
        if error is None:
            assert not self.wrong, self.wrong[:5]

    def _after(self, method: Any) -> Any:
        def call(state: Any) -> None:
            method(state)
            self.check(f"{method.__name__} {state.name}")

        return call

    def check(self, where: str) -> None:
        """May be called within a callback of autograd, which would swallow an assertion."""
        self.checks += 1
        there_is = live_bytes(self.model)
        self.peak_bytes = max(self.peak_bytes, there_is)
        counted = self.residency.live_bytes
        if there_is != counted:
            self.wrong.append(f"{where}: {counted} bytes are counted and {there_is} there")
        if there_is > self.residency.max_bytes:
            self.wrong.append(f"{where}: {there_is} bytes, {self.residency.max_bytes} allowed")
        if self.residency.live_elements > self.residency.max_elements:
            self.wrong.append(f"{where}: {self.residency.live_elements} elements")


class SlowLinks:
    """Stands in front of the links: writes down in which order what is asked of the servers gets there, and
    can hold it back.

    asked: the names of the parameters of each request, in the order in which it was given to the links.
    """

    def __init__(self, model: nn.Module) -> None:
        offloaded = find(model)
        assert offloaded is not None
        self.asked: list[list[str]] = []
        self._open = threading.Event()
        self._open.set()
        self._free = 0
        self._transfer = offloaded.job.transfer
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def __enter__(self) -> "SlowLinks":
        self._pull = self._transfer.pull
        self._transfer.pull = self._later  # type: ignore[method-assign]
        self._thread = threading.Thread(target=self._leave, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._open.set()
        self._queue.put(None)
        self._thread.join(10)
        del self._transfer.pull

    def hold(self, *, after: int = 0) -> None:
        """From here on lets only so many requests go on."""
        self._free = after
        self._open.clear()

    def let_go(self, seconds: float = 0.0) -> None:
        """Lets everything go on, so much later."""
        threading.Timer(seconds, self._open.set).start()

    def _later(self, destinations: Sequence[Destination], version: int, *, max_staleness: int = 0) -> Arrival:
        assert not max_staleness
        self.asked.append([destination.remote.name for destination in destinations])
        future: Future[None] = Future()
        # A copy: who asked clears the list.
        self._queue.put((list(destinations), version, future))
        return Arrival([future], "what is held back", 20)

    def _leave(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._free:
                self._free -= 1
            else:
                self._open.wait(20)
            arrival, done = self._pull(*item[:2]), functools.partial(_finish, item[2])
            # Views of a parameter's memory tell that it is in use.
            item = None
            arrival.when_done(done)


def _finish(future: "Future[None]", error: BaseException | None) -> None:
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
