"""Moves whole parameters between this process and the servers that hold their chunks."""

import functools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from protos.layout import ChunkGrid
from trainer.errors import DeadlineExceeded
from trainer.links import Pull, Push, PushKind, Run

if TYPE_CHECKING:
    from trainer.job import Job

GRACE_SECONDS = 5.0
"""How much longer than the server the trainer waits, so that the server's reason arrives first."""


@dataclass(frozen=True)
class RemoteParameter:
    """Where a parameter is on the servers.

    index: in the job's manifest (while a model is built: its staging id).
    dtype: as stored.
    shards: of each chunk of the grid.
    """

    index: int
    name: str
    dtype: torch.dtype
    grid: ChunkGrid
    shards: tuple[int, ...]
    staged: bool = False


@dataclass(frozen=True)
class Destination:
    """A parameter to pull and where its bytes go.

    buffer: 1-d uint8 CPU tensor of the whole parameter in `dtype`.
    elements: of the flattened parameter, the first one and the one after the last, to pull only a part, to
        where it is in the buffer; None for all.
    """

    remote: RemoteParameter
    buffer: torch.Tensor
    dtype: torch.dtype
    elements: tuple[int, int] | None = None


class Arrival:
    """Parameters on their way."""

    def __init__(self, futures: Sequence["Future[None]"], what: str, timeout: float) -> None:
        self._futures = futures
        self._what = what
        self._timeout = timeout

    def when_done(self, callback: Callable[[BaseException | None], None]) -> None:
        """Has `callback` called once, from any thread, when all bytes are there or all that can come is; with
        the first error, if there was one."""
        left = len(self._futures)
        lock = threading.Lock()
        first: BaseException | None = None

        def count(future: "Future[None]") -> None:
            nonlocal left, first
            with lock:
                left -= 1
                if first is None:
                    first = CancelledError() if future.cancelled() else future.exception()
                last = left == 0
            if last:
                callback(first)

        for future in self._futures:
            future.add_done_callback(count)
        if not self._futures:
            callback(None)

    def wait(self) -> None:
        """Returns when all bytes are there; raises what went wrong, or DeadlineExceeded."""
        deadline = time.monotonic() + self._timeout + GRACE_SECONDS
        for future in self._futures:
            try:
                future.result(timeout=max(deadline - time.monotonic(), 0.0))
            except TimeoutError as error:
                if future.done():
                    raise
                raise DeadlineExceeded(
                    f"{self._what} did not arrive within {self._timeout:g} s; see 'zero-ps status'"
                ) from error


class Transfer:
    """Splits parameters into the chunks of each server and puts them together again."""

    def __init__(self, job: "Job") -> None:
        self._job = job
        self._lock = threading.Condition()
        self._inflight_bytes = 0
        self._error: BaseException | None = None

    def pull(self, destinations: Sequence[Destination], version: int) -> Arrival:
        """Asks for parameters at one version, in the order given: one request to each server and dtype."""
        futures = []
        nbytes = 0
        for dtype in dict.fromkeys(d.dtype for d in destinations):
            group = [d for d in destinations if d.dtype == dtype]
            for shard, link in enumerate(self._job.links):
                chunks: list[tuple[int, int]] = []
                buffers: list[torch.Tensor] = []
                runs: list[Run] = []
                for destination in group:
                    for part in _parts(destination.remote, destination.dtype, shard, destination.elements):
                        chunks.append((destination.remote.index, part.chunk))
                        buffers.append(part.of(destination.buffer))
                        runs.append(part.run)
                        nbytes += part.nbytes
                if chunks:
                    pull = Pull(
                        version=version,
                        chunks=chunks,
                        destinations=buffers,
                        dtype=dtype,
                        timeout=self._job.timeout,
                        staged=group[0].remote.staged,
                        runs=runs if any(destination.elements for destination in group) else None,
                    )
                    futures.append(link.pull(pull))
        with self._lock:
            self._job.stats.bytes_pulled += nbytes
        names = ", ".join(d.remote.name for d in destinations[:3]) + (", ..." if len(destinations) > 3 else "")
        return Arrival(futures, f"{names} at version {version}", self._job.timeout)

    def push(
        self,
        remote: RemoteParameter,
        tensor: torch.Tensor,
        kind: PushKind,
        *,
        step: int,
        sequence: int = 0,
        final: bool = False,
        chunks: Iterable[int] | None = None,
        elements: tuple[int, int] | None = None,
        on_sent: Callable[[], None] | None = None,
    ) -> None:
        """Sends a whole parameter, or some of its chunks, without waiting for the acknowledgement.

        tensor: contiguous CPU tensor of the parameter's shape, not to be changed before `flush`.
        elements: of a gradient, those of the flattened parameter that the tensor is of, the first one and the
            one after the last; None for all.
        on_sent: called, from any thread, when every server has acknowledged its part.
        """
        self.check()
        data = tensor.reshape(-1).view(torch.uint8)
        wanted = None if chunks is None else set(chunks)
        pushes = []
        for shard in range(len(self._job.links)):
            parts = [
                part for part in _parts(remote, tensor.dtype, shard, elements) if wanted is None or part.chunk in wanted
            ]
            if parts:
                pushes.append((shard, parts))
        origin = elements[0] * tensor.itemsize if elements is not None else 0
        sending = _Sending(len(pushes), on_sent)
        for shard, parts in pushes:
            size = sum(part.nbytes for part in parts)
            with self._lock:
                self._inflight_bytes += size
                self._job.stats.bytes_pushed += size
            future = self._job.links[shard].push(
                Push(
                    kind=kind,
                    step=step,
                    chunks=[(remote.index, part.chunk) for part in parts],
                    sources=[part.of(data, origin) for part in parts],
                    dtype=tensor.dtype,
                    sequence=sequence,
                    runs=None if elements is None else [part.run for part in parts],
                    final=final,
                )
            )
            future.add_done_callback(functools.partial(self._acknowledged, size, sending))

    def reserve(self, size: int, limit: int) -> None:
        """Waits until `size` more bytes make at most `limit` bytes on their way; one push may always be."""
        self._wait(lambda: self._inflight_bytes == 0 or self._inflight_bytes + size <= limit)

    def hold(self, size: int) -> None:
        """Counts bytes as being on their way that will be pushed in a while."""
        with self._lock:
            self._inflight_bytes += size

    def let_go(self, size: int, error: BaseException | None = None) -> None:
        """What was held has been pushed, or failed."""
        with self._lock:
            self._inflight_bytes -= size
            self._error = self._error or error
            self._lock.notify_all()

    def flush(self) -> None:
        """Waits until everything that was pushed is acknowledged; raises the first error of any push."""
        self._wait(lambda: self._inflight_bytes == 0)

    def check(self) -> None:
        """Raises the error of a push that failed since; the step that it belonged to cannot be completed."""
        if self._error is not None:
            raise self._error

    def _wait(self, ready: Callable[[], bool]) -> None:
        with self._lock:
            if not self._lock.wait_for(lambda: self._error is not None or ready(), self._job.timeout + GRACE_SECONDS):
                raise DeadlineExceeded(
                    f"{self._inflight_bytes} bytes pushed to the servers were not acknowledged within "
                    f"{self._job.timeout:g} s; see 'zero-ps status'"
                )
        self.check()

    def _acknowledged(self, size: int, sending: "_Sending", future: "Future[None]") -> None:
        with self._lock:
            self._inflight_bytes -= size
            if not future.cancelled() and future.exception() is not None:
                self._error = self._error or future.exception()
            sending.parts -= 1
            finished = sending.parts == 0
            self._lock.notify_all()
        if finished and sending.on_sent is not None:
            sending.on_sent()


@dataclass
class _Sending:
    """A push whose parts go to several servers."""

    parts: int
    on_sent: Callable[[], None] | None


@dataclass(frozen=True)
class _Part:
    """What of a parameter is moved to or from one chunk.

    run: in elements of the chunk. start, nbytes: in the parameter's bytes.
    """

    chunk: int
    run: Run
    start: int
    nbytes: int

    def of(self, data: torch.Tensor, origin: int = 0) -> torch.Tensor:
        """The part's bytes of the parameter's; origin: with which of them `data` begins."""
        return data.narrow(0, self.start - origin, self.nbytes)


def _parts(
    remote: RemoteParameter, dtype: torch.dtype, shard: int, elements: tuple[int, int] | None
) -> Iterable[_Part]:
    """What a shard holds of a parameter, or of some of its elements."""
    grid = remote.grid
    first, end = (0, grid.rows * grid.row_elements) if elements is None else elements
    chunk_elements = max(1, grid.chunk_rows * grid.row_elements)
    if first == end:
        return
    for chunk in range(first // chunk_elements, -(-end // chunk_elements)):
        if remote.shards[chunk] == shard:
            begin, stop = grid.element_range(chunk)
            low, high = max(begin, first), min(stop, end)
            yield _Part(chunk, (low - begin, high - begin), low * dtype.itemsize, (high - low) * dtype.itemsize)
