"""Requests for parameters: which are on their way, and in which order they leave.

The order is that of need. A link answers in the order in which it was asked, so what was asked for ahead
of time must not stand in front of what a module waits for: only a window of bytes is given to the links,
the rest waits here, and what is urgent goes before it.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import torch

from trainer.errors import DeadlineExceeded
from trainer.group import TrainerGroup, Whole
from trainer.job import Job
from trainer.landing import Landing, landing
from trainer.pace import Pace
from trainer.parameter import OffloadedParameter
from trainer.selection import elements
from trainer.transfer import GRACE_SECONDS, Destination

WINDOW_BYTES = 16 << 20
"""How many bytes are asked of each server at once: enough to keep it busy, and no more than what an urgent
request may have to wait for."""

_SMALL_BYTES = 1 << 20
"""Less than this does not keep a link busy for as long as a request takes to make."""

_PIECE_BYTES = 8 << 20
"""Parameters, or parts of them, that are larger than this are asked for in pieces."""


class Request:
    """Parameters that are asked for together.

    version: of the bytes that come; max_staleness: how many versions older they may be.
    sent: whether a part of it was given to the links.
    asked_at, arrived_at: on the performance counter; arrived_at is 0 until then.
    error: why it failed.
    group: those who pull the other parts of the parameters; None where this trainer pulls all of them.
    mine: in a group, done when this trainer's parts are here.
    device: that links write to; in a group parameters become whole in host memory.
    """

    def __init__(
        self,
        states: Sequence[OffloadedParameter],
        version: int,
        group: TrainerGroup | None,
        max_staleness: int,
        device: torch.device | None,
    ) -> None:
        self.states = states
        self.version = version
        self.max_staleness = max_staleness
        self.group = group
        self.mine: Future[None] = Future()
        self.nbytes = sum(state.nbytes for state in states)
        self.landings: list[Landing] = [landing(state, device if group is None else None) for state in states]
        self.sent = False
        self.error: BaseException | None = None
        self.asked_at = time.perf_counter()
        self.arrived_at = 0.0
        self.outstanding = 0
        self.done = False

    def pieces(self) -> Iterator[tuple[list[Destination], int]]:
        """What is asked of the links at once, each with its bytes."""
        together: list[Destination] = []
        size = 0
        for state, place in zip(self.states, self.landings, strict=True):
            assert state.remote is not None
            first, end = (0, state.numel) if self.group is None else self.group.part(state.numel)
            grid, itemsize = state.remote.grid, state.dtype.itemsize
            if len(self.states) > 1 or (end - first) * itemsize <= _PIECE_BYTES:
                parts = None if self.group is None else tuple(elements(grid, first, end))
                together.append(Destination(state.remote, place.buffer, state.dtype, parts, place.after))
                size += (end - first) * itemsize
                continue
            for start, stop in _pieces(first, end, grid.chunk_elements(0), itemsize):
                some = tuple(elements(grid, start, stop))
                destination = Destination(state.remote, place.buffer, state.dtype, some, place.after)
                yield [destination], (stop - start) * itemsize
        if size:
            yield together, size

    def whole(self) -> list[Whole]:
        """What the group makes whole."""
        return [
            Whole(place.buffer, state.numel, state.dtype.itemsize)
            for state, place in zip(self.states, self.landings, strict=True)
        ]

    def describe(self) -> str:
        names = ", ".join(repr(state.name) for state in self.states[:3])
        more = f" and {len(self.states) - 3} more" if len(self.states) > 3 else ""
        return f"{names}{more} at version {self.version}"


class Requests:
    """The requests of one model. Methods are called by the thread that runs it; bytes arrive in others.

    group: the trainers that pull together, if they do. Then requests have to be the same on all of them, in
        the same order.
    on_arrival: called, from any thread, when the bytes of a request are here.
    """

    def __init__(self, job: Job, pace: Pace, group: TrainerGroup | None = None) -> None:
        self._job = job
        self._pace = pace
        self._group = group
        self._changed = threading.Condition(threading.RLock())
        self._waiting: deque[tuple[Request, list[Destination], int]] = deque()
        self._urgent: deque[tuple[Request, list[Destination], int]] = deque()
        self._window = WINDOW_BYTES * max(1, len(job.servers))
        self._sent_bytes = 0
        self._last_arrival = 0.0
        self._sending = False
        self._unsettled: dict[Request, None] = {}
        self.backlog_bytes = 0
        self.on_arrival: Callable[[Request], None] | None = None

    # ------------------------------------------------------------ asking

    def submit(
        self,
        states: Sequence[OffloadedParameter],
        version: int,
        *,
        urgent: bool,
        alone: bool = False,
        max_staleness: int = 0,
    ) -> Request:
        """Asks for parameters that have their memory; from here on each one's `request` is this one.

        alone: all of them from the servers, also where there is a group.
        """
        group = None if alone else self._group
        request = Request(states, version, group, max_staleness, self._job.device)
        pieces = list(request.pieces())
        request.outstanding = len(pieces)
        self._unsettled[request] = None
        with self._changed:
            self.backlog_bytes += request.nbytes
            (self._urgent if urgent else self._waiting).extend((request, *piece) for piece in pieces)
        for state in states:
            state.request = request
        if request.group is not None:
            request.group.all_gather(
                request.describe(), request.whole(), request.mine, lambda error: self._gathered(request, error)
            )
        if not pieces:
            request.mine.set_result(None)
        self._send()
        return request

    def hurry(self, request: Request) -> None:
        """Somebody waits for a request that was ahead of time: what is left of it goes first."""
        with self._changed:
            if request.done:
                return
            mine = [entry for entry in self._waiting if entry[0] is request]
            if not mine:
                return
            self._waiting = deque(entry for entry in self._waiting if entry[0] is not request)
            self._urgent.extend(mine)
        self._send()

    def withdraw(self) -> list[Request]:
        """Takes back what no link was given any part of; the requests, whose memory may be freed."""
        if self._group is not None:
            # The others may have moved their parts already.
            return []
        with self._changed:
            gone = list(dict.fromkeys(entry[0] for entry in self._waiting if not entry[0].sent))
            self._waiting = deque(entry for entry in self._waiting if entry[0].sent)
            for request in gone:
                request.done = True
                self.backlog_bytes -= request.nbytes
        for request in gone:
            self._close(request)
        return gone

    # ------------------------------------------------------------ waiting

    def wait(self, request: Request) -> None:
        """Returns when the parameters are whole; raises what went wrong, or DeadlineExceeded."""
        self.hurry(request)
        with self._changed:
            if not self._changed.wait_for(lambda: request.done, self._job.timeout + GRACE_SECONDS):
                raise DeadlineExceeded(
                    f"{request.describe()} did not arrive within {self._job.timeout:g} s; see 'zero-ps status'"
                )

    def settle(self, request: Request) -> None:
        """Ends a request that is done: its parameters are whole, or it raises why they are not."""
        for state, place in zip(request.states, request.landings, strict=True):
            if state.request is request and request.error is None:
                place.use()
                state.version = request.version
                state.stale = request.max_staleness > 0
        self._close(request)
        if request.error is not None:
            raise request.error

    def _close(self, request: Request) -> None:
        self._unsettled.pop(request, None)
        for state, place in zip(request.states, request.landings, strict=True):
            if state.request is request:
                state.request = None
                place.close()

    def unsettled(self) -> list[Request]:
        """What was asked for and not used yet, oldest first; it may be here."""
        return list(self._unsettled)

    # ------------------------------------------------------------ the links

    def _send(self) -> None:
        """Gives the links what fits into the window, in the order of need."""
        with self._changed:
            if self._sending:
                # A link that fails answers at once, from within the call below.
                return
            self._sending = True
            try:
                while entry := self._next_entry():
                    self._send_piece(*entry)
            finally:
                self._sending = False

    def _next_entry(self) -> tuple[Request, list[Destination], int] | None:
        source = self._urgent or self._waiting
        if not source or (self._sent_bytes and self._sent_bytes + source[0][2] > self._window):
            return None
        return source.popleft()

    def _send_piece(self, request: Request, destinations: list[Destination], nbytes: int) -> None:
        request.sent = True
        self._sent_bytes += nbytes
        asked_at = time.perf_counter()
        arrival = self._job.transfer.pull(destinations, request.version, max_staleness=request.max_staleness)
        # Views of a parameter's memory tell that it is in use, and another thread may see it arrive at once.
        destinations.clear()
        arrival.when_done(lambda error: self._arrived(request, nbytes, asked_at, error))

    def _arrived(self, request: Request, nbytes: int, asked_at: float, error: BaseException | None) -> None:
        now = time.perf_counter()
        with self._changed:
            self._sent_bytes -= nbytes
            # Not counting what this one waited for the one before it.
            self._pace.arrived(nbytes, now - max(asked_at, self._last_arrival))
            self._last_arrival = now
            request.error = request.error or error
            request.outstanding -= 1
            finished = request.outstanding == 0
        if finished and request.group is None:
            self._finish(request, now)
        elif finished and request.error is None:
            request.mine.set_result(None)
        elif finished:
            request.mine.set_exception(request.error)
        self._send()

    def _gathered(self, request: Request, error: BaseException | None) -> None:
        request.error = request.error or error
        self._finish(request, time.perf_counter())

    def _finish(self, request: Request, now: float) -> None:
        if request.error is None:
            try:
                for place in request.landings:
                    place.arrived()
            except Exception as error:  # whoever waits has to hear of it
                request.error = error
        request.arrived_at = now
        with self._changed:
            request.done = True
            self.backlog_bytes -= request.nbytes
            self._changed.notify_all()
        if self.on_arrival is not None:
            self.on_arrival(request)


def small_ones_together(bucket: Sequence[OffloadedParameter]) -> Iterator[list[OffloadedParameter]]:
    """Cuts a bucket into requests. A large parameter is a request of its own: a module is not to wait for
    the neighbours of what it needs. Small ones share one, which costs as much as they do."""
    small: list[OffloadedParameter] = []
    small_bytes = 0
    for state in bucket:
        if state.nbytes < _SMALL_BYTES:
            small.append(state)
            small_bytes += state.nbytes
            if small_bytes < _SMALL_BYTES:
                continue
        if small:
            yield small
            small, small_bytes = [], 0
        if state.nbytes >= _SMALL_BYTES:
            yield [state]
    if small:
        yield small


def _pieces(first: int, end: int, chunk_elements: int, itemsize: int) -> Iterator[tuple[int, int]]:
    """Cuts elements of a parameter, between whole chunks, into pieces of about `_PIECE_BYTES`."""
    chunks = max(1, _PIECE_BYTES // (chunk_elements * itemsize))
    while first < end:
        stop = min(end, (first // chunk_elements + chunks) * chunk_elements)
        yield first, stop
        first = stop
