"""Moves whole parameters between this process and the servers that hold their chunks."""

import functools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from protos.layout import ChunkGrid
from trainer.bundle import Bundle
from trainer.errors import DeadlineExceeded
from trainer.links import Pull, Push, PushKind, Run
from trainer.selection import Part, everything

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

    def on(self, shard: int, parts: Iterable[Part] | None = None) -> Iterator[Part]:
        """Those of some parts, or of all of the parameter, that a shard holds."""
        return (p for p in (everything(self.grid) if parts is None else parts) if self.shards[p.chunk] == shard)


@dataclass(frozen=True)
class Destination:
    """A parameter to pull and where its bytes go.

    buffer: 1-d uint8 tensor, in `dtype`: of the whole parameter, or what `parts` say. On the CPU, or on `Job.device`.
    parts: to pull only these; None for all.
    after: points that the device has to have come to before the buffer is written.
    """

    remote: RemoteParameter
    buffer: torch.Tensor
    dtype: torch.dtype
    parts: Sequence[Part] | None = None
    after: Sequence["torch.cuda.Event"] = ()


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
        # The array that stands for the weights: empty for these themselves; see `trainer.ema`.
        self.weights = ""
        self._job = job
        self._lock = threading.Condition()
        self._inflight_bytes = 0
        self._error: BaseException | None = None
        # By shard: small gradients that leave with the next ones, at the latest before anybody waits for them.
        # Whoever waits has them sent, so that no more of them may wait.
        self._waiters = 0
        self._bundles: defaultdict[int, Bundle] = defaultdict(Bundle)

    def pull(
        self, destinations: Sequence[Destination], version: int, array: str | None = None, max_staleness: int = 0
    ) -> Arrival:
        """Asks for parameters at one version, in the order given: one request to each server and dtype.

        array: optimizer state by its name; None for what stands for their weights.
        max_staleness: of weights, how many versions older each chunk may be.
        """
        futures = []
        nbytes = 0
        for dtype in dict.fromkeys(d.dtype for d in destinations):
            group = [d for d in destinations if d.dtype == dtype]
            after = [point for d in group for point in d.after]
            for shard, link in enumerate(self._job.links):
                chunks: list[tuple[int, int]] = []
                buffers: list[torch.Tensor] = []
                runs: list[Sequence[Run]] = []
                for destination in group:
                    for part in destination.remote.on(shard, destination.parts):
                        if not part.runs:
                            continue
                        chunks.append((destination.remote.index, part.chunk))
                        buffers.append(_bytes_of(part, destination.buffer, dtype))
                        runs.append(part.runs)
                        nbytes += buffers[-1].numel()
                if chunks:
                    pull = Pull(
                        version=version,
                        chunks=chunks,
                        destinations=buffers,
                        dtype=dtype,
                        timeout=self._job.timeout,
                        staged=group[0].remote.staged,
                        array=self.weights if array is None else array,
                        runs=runs if any(destination.parts is not None for destination in group) else None,
                        max_staleness=max_staleness,
                        after=after,
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
        array: str = "",
        chunks: Iterable[int] | None = None,
        parts: Sequence[Part] | None = None,
        on_sent: Callable[[], None] | None = None,
        after: Sequence["torch.cuda.Event"] = (),
    ) -> None:
        """Sends a whole parameter, or some of its chunks, without waiting for the acknowledgement.

        tensor: contiguous tensor of the parameter's shape, or what `parts` say, on the CPU or on `Job.device`; not to
            be changed before `flush`.
        parts: of a gradient, what the tensor is of; None for all.
        on_sent: called, from any thread, when every server has acknowledged its part.
        after: points that the device has to have come to before the tensor is read.
        """
        self.check()
        data = tensor.reshape(-1).view(torch.uint8)
        wanted = None if chunks is None else set(chunks)
        pushes = []
        for shard in range(len(self._job.links)):
            here = [part for part in remote.on(shard, parts) if wanted is None or part.chunk in wanted]
            if here:
                pushes.append((shard, here))
        sending = _Sending(len(pushes), on_sent)
        for shard, here in pushes:
            size = sum(part.count for part in here) * tensor.itemsize
            with self._lock:
                self._job.stats.bytes_pushed += size
                # That a gradient is zero has to arrive, too, though it has no bytes.
                size = max(1, size)
                self._inflight_bytes += size
            push = Push(
                kind=kind,
                step=step,
                chunks=[(remote.index, part.chunk) for part in here],
                sources=[_bytes_of(part, data, tensor.dtype) for part in here],
                dtype=tensor.dtype,
                sequence=sequence,
                array=array,
                runs=None if parts is None else [part.runs for part in here],
                final=final,
                after=after,
            )
            self._submit(shard, push, functools.partial(self._acknowledged, size, sending))

    def _submit(self, shard: int, push: Push, done: Callable[["Future[None]"], None]) -> None:
        """Sends a push behind what waits for its server, or has it wait, too."""
        link, bundle = self._job.links[shard], self._bundles[shard]
        with self._lock:
            ready = None if bundle.takes(push) and not self._waiters else bundle.take()
            # What did not fit may be the first of the next.
            waits = bundle.takes(push) and not self._waiters
            if waits:
                bundle.add(push, done)
        if ready is not None:
            link.push(ready[0]).add_done_callback(ready[1])
        if not waits:
            link.push(push).add_done_callback(done)

    def _send_bundles(self) -> None:
        for shard, link in enumerate(self._job.links):
            with self._lock:
                ready = self._bundles[shard].take()
            if ready is not None:
                link.push(ready[0]).add_done_callback(ready[1])

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
            if self._error is None and ready():
                return
            self._waiters += 1
        try:
            self._send_bundles()
            self._wait_until(ready)
        finally:
            with self._lock:
                self._waiters -= 1
        self.check()

    def _wait_until(self, ready: Callable[[], bool]) -> None:
        with self._lock:
            if not self._lock.wait_for(lambda: self._error is not None or ready(), self._job.timeout + GRACE_SECONDS):
                raise DeadlineExceeded(
                    f"{self._inflight_bytes} bytes pushed to the servers were not acknowledged within "
                    f"{self._job.timeout:g} s; see 'zero-ps status'"
                )

    def _acknowledged(self, size: int, sending: "_Sending", future: "Future[None]") -> None:
        with self._lock:
            self.let_go(size, None if future.cancelled() else future.exception())
            sending.parts -= 1
            finished = sending.parts == 0
        if finished and sending.on_sent is not None:
            sending.on_sent()


@dataclass
class _Sending:
    """A push whose parts go to several servers."""

    parts: int
    on_sent: Callable[[], None] | None


def _bytes_of(part: Part, data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return data.narrow(0, part.start * dtype.itemsize, part.count * dtype.itemsize)
