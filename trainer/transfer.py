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
from trainer.links import Pull, Push, PushKind

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
    chunks: of the grid, to pull only a part; None for all.
    """

    remote: RemoteParameter
    buffer: torch.Tensor
    dtype: torch.dtype
    chunks: range | None = None


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
                for destination in group:
                    for chunk, part in _parts(
                        destination.remote, destination.buffer, destination.dtype, shard, destination.chunks
                    ):
                        chunks.append((destination.remote.index, chunk))
                        buffers.append(part)
                        nbytes += part.numel()
                if chunks:
                    pull = Pull(
                        version=version,
                        chunks=chunks,
                        destinations=buffers,
                        dtype=dtype,
                        timeout=self._job.timeout,
                        staged=group[0].remote.staged,
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
        chunks: Iterable[int] | None = None,
        on_sent: Callable[[], None] | None = None,
    ) -> None:
        """Sends a whole parameter, or some of its chunks, without waiting for the acknowledgement.

        tensor: contiguous CPU tensor of the parameter's shape, not to be changed before `flush`.
        on_sent: called, from any thread, when every server has acknowledged its part.
        """
        self.check()
        data = tensor.reshape(-1).view(torch.uint8)
        wanted = None if chunks is None else set(chunks)
        pushes = []
        for shard in range(len(self._job.links)):
            parts = [
                (chunk, part)
                for chunk, part in _parts(remote, data, tensor.dtype, shard)
                if wanted is None or chunk in wanted
            ]
            if parts:
                pushes.append((shard, parts))
        sending = _Sending(len(pushes), on_sent)
        for shard, parts in pushes:
            size = sum(part.numel() for _, part in parts)
            with self._lock:
                self._inflight_bytes += size
            self._job.stats.bytes_pushed += size
            future = self._job.links[shard].push(
                Push(
                    kind=kind,
                    step=step,
                    chunks=[(remote.index, chunk) for chunk, _ in parts],
                    sources=[part for _, part in parts],
                    dtype=tensor.dtype,
                    sequence=sequence,
                )
            )
            future.add_done_callback(functools.partial(self._acknowledged, size, sending))

    def reserve(self, size: int, limit: int) -> None:
        """Waits until `size` more bytes make at most `limit` bytes on their way; one push may always be."""
        self._wait(lambda: self._inflight_bytes == 0 or self._inflight_bytes + size <= limit)

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


def _parts(
    remote: RemoteParameter, data: torch.Tensor, dtype: torch.dtype, shard: int, chunks: range | None = None
) -> Iterable[tuple[int, torch.Tensor]]:
    """The chunks of a parameter that a shard holds, each with its part of the parameter's bytes."""
    for chunk in range(len(remote.shards)) if chunks is None else chunks:
        if remote.shards[chunk] == shard:
            start, stop = remote.grid.element_range(chunk)
            yield chunk, data.narrow(0, start * dtype.itemsize, (stop - start) * dtype.itemsize)
