"""The memory of a tier: what is taken, which parts leave for others, and the disk that they go to and come from.

Every method expects the monitor to be held, except where stated.
"""

import heapq
import itertools
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from protos.sizes import format_bytes
from ps.errors import ServerError, StorageFailed
from ps.monitor import Monitor, Patience
from ps.tier.buffers import Buffer, BufferPool
from ps.tier.part import NEVER, Part
from ps.tier.policy import Policy

READ_THREADS = 8
WRITE_THREADS = 6
"""Files in flight each way."""

AHEAD_BYTES = 256 << 20
"""The most that is read before it is used: enough to keep a disk busy, whatever memory there is."""

_SPARE_SHARE, _SPARE_BYTES = 1 / 12, 64 << 20
"""Of the limit, and at most: what parts that nobody uses leave free. Who needs room then seldom waits for the disk, and
buffers of one size need not be given back for each of another size, whose fresh pages would cost more than what is
done with them."""


class Room:
    """`limit_bytes` of memory.

    used_bytes: of all buffers, of scratch, and of what never leaves. leaving_bytes: those that are free as
    soon as they are written. peak_bytes: the most that was resident, buffers that wait to be used again included.
    """

    def __init__(self, limit_bytes: int, policy: Policy, monitor: Monitor) -> None:
        self.limit_bytes = limit_bytes
        # What idle parts may fill.
        self._fill_bytes = limit_bytes - min(int(limit_bytes * _SPARE_SHARE), _SPARE_BYTES)
        self.used_bytes = 0
        self.leaving_bytes = 0
        self.peak_bytes = 0
        self.spilled_bytes = 0
        self.bytes_read = 0
        self.bytes_written = 0
        self._policy = policy
        self._monitor = monitor
        self._pool = BufferPool()
        # Who waits for room, in the order of arrival, and for how much.
        self._wanted: OrderedDict[object, int] = OrderedDict()
        # What is to be read ahead, and when it is used.
        self._ahead: OrderedDict[Part, float] = OrderedDict()
        self._resident: set[Part] = set()
        self._heap: list[tuple[float, int, Part]] = []
        self._entries = itertools.count()
        self._write_error: StorageFailed | None = None
        self._readers = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="tier-read")
        self._writers = ThreadPoolExecutor(WRITE_THREADS, thread_name_prefix="tier-write")

    def close(self) -> None:
        """Ends the threads. Not with the monitor held."""
        self._readers.shutdown(cancel_futures=True)
        self._writers.shutdown(cancel_futures=True)

    # ------------------------------------------------------------ taking and freeing

    def wait(self, size: int, what: str, patience: Patience) -> None:
        """Waits until `size` bytes more fit; the oldest is first.

        Raises StorageFailed if what should leave cannot be written, and Timeout.
        """
        if not self._wanted and self.used_bytes + size <= self.limit_bytes:
            self._evict(size)
            return
        ticket = object()
        self._wanted[ticket] = size
        self._write_error = None

        def ready() -> bool:
            if self.used_bytes + size > self.limit_bytes:
                self._evict()
            return next(iter(self._wanted)) is ticket and self.used_bytes + size <= self.limit_bytes

        def give_up() -> None:
            if self._write_error is not None:
                raise self._write_error

        try:
            self._monitor.wait_until(ready, patience, lambda: f"memory for {what}; {self.shares()}", give_up)
        finally:
            del self._wanted[ticket]
            self._monitor.changed()

    def shares(self) -> str:
        return (
            f"of {format_bytes(self.limit_bytes)}, {format_bytes(self.used_bytes)} are taken and "
            f"{format_bytes(self.leaving_bytes)} of these are being written"
        )

    def buffer(self, size: int) -> Buffer:
        """Expects that there is room."""
        found = self._pool.take(size, self.limit_bytes - self.used_bytes)
        self.used_bytes += size
        self._count()
        return found

    def give(self, buffer: Buffer) -> None:
        self.used_bytes -= buffer.size
        self._pool.give(buffer)
        self._monitor.changed()

    def take(self, size: int) -> None:
        """Memory that is no buffer of this room. Expects that there is room."""
        self.used_bytes += size
        self._pool.shrink(max(0, self.limit_bytes - self.used_bytes))
        self._count()

    def untake(self, size: int) -> None:
        self.used_bytes -= size
        self._monitor.changed()

    def _count(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self.used_bytes + self._pool.bytes)

    # ------------------------------------------------------------ parts

    def allocate(self, part: Part) -> None:
        """Gives a part its memory, with anything in it. Expects that there is room."""
        self.install(part, self.buffer(part.size))

    def install(self, part: Part, buffer: Buffer) -> None:
        """Makes this the part's memory, in place of what it has."""
        if part.buffer is not None:
            self.forget(part)
        elif part.filled:
            self.spilled_bytes -= part.size
        part.buffer = buffer
        self._resident.add(part)

    def idle(self, part: Part) -> None:
        """Nobody uses the part any more; if it is in memory it may leave."""
        if part.busy is not None or part.buffer is None:
            return
        if part.discarded or not part.filled:
            self.forget(part)
            return
        rank = self._policy.rank(part)
        if part.entry >= 0 and rank == part.next_use:
            return
        part.next_use, part.entry = rank, next(self._entries)
        heapq.heappush(self._heap, (-rank, part.entry, part))
        if len(self._heap) > 2 * len(self._resident) + 64:
            self._heap = [entry for entry in self._heap if entry[2].entry == entry[1]]
            heapq.heapify(self._heap)

    def forget(self, part: Part) -> None:
        """Frees the memory of a part whose content nobody needs."""
        if part.buffer is not None:
            self.give(part.buffer)
            self.lose(part)

    def lose(self, part: Part) -> None:
        """The part's memory is another's now."""
        part.buffer = None
        part.entry = -1
        self._resident.discard(part)

    def rank_again(self) -> None:
        """The forecasts have changed."""
        self._heap = []
        for part in list(self._resident):
            part.entry = -1
            if not part.pins:
                self.idle(part)

    def _leave(self, part: Part) -> None:
        """Out of memory; what is on disk stays."""
        self.forget(part)
        if part.filled:
            self.spilled_bytes += part.size

    def _evict(self, ahead_bytes: int = 0, later_than: float | None = None) -> bool:
        """Lets parts leave until everything that waits has room, and some is spare. Returns whether that will do.

        ahead_bytes, later_than: and this much besides, in place of what is used later than that.
        """
        wanted = sum(self._wanted.values()) + ahead_bytes
        while self.used_bytes - self.leaving_bytes + wanted > self._fill_bytes:
            part = self._last()
            if part is None or (later_than is not None and part.next_use <= later_than):
                return False
            heapq.heappop(self._heap)
            part.entry = -1
            if part.derivable and part.next_use == NEVER:
                part.filled = False
            if part.filled and not part.clean:
                part.busy = "writing"
                self.leaving_bytes += part.size
                self._writers.submit(self._write, part, part.stamp, None)
            else:
                self._leave(part)
        return True

    def _last(self) -> Part | None:
        """The idle part that is needed last: on top of the heap."""
        while self._heap:
            _, entry, part = self._heap[0]
            if entry == part.entry:
                if part.buffer is not None and not part.pins and part.busy is None:
                    return part
                part.entry = -1
            heapq.heappop(self._heap)
        return None

    # ------------------------------------------------------------ reading ahead

    def ahead(self, part: Part) -> None:
        """The part is needed soon."""
        if self._may_load(part):
            self._ahead[part] = self._policy.rank(part)

    def ahead_done(self, part: Part) -> None:
        self._ahead.pop(part, None)

    def pump(self) -> None:
        """Reads ahead while there is room, or something that is needed later."""
        if self._write_error is not None:
            self._ahead.clear()
        while self._ahead and not self._wanted:
            part = next(iter(self._ahead))
            if self._may_load(part):
                if self.used_bytes + part.size > self._fill_bytes:
                    self._make_way()
                if self.used_bytes + part.size > self._fill_bytes:
                    if self.leaving_bytes:
                        return
                else:
                    self.allocate(part)
                    self.load(part)
            # Loaded; or not worth it, as all that is in memory is needed sooner.
            self._ahead.pop(part, None)

    def _make_way(self) -> None:
        """Lets leave what is needed later than what is to be read ahead."""
        size = 0
        for part, rank in self._ahead.items():
            size += part.size
            if size > min(self.limit_bytes // 4, AHEAD_BYTES) or not self._evict(size, rank):
                return

    @staticmethod
    def _may_load(part: Part) -> bool:
        return part.filled and part.buffer is None and part.busy is None and not part.discarded

    # ------------------------------------------------------------ disk

    def load(self, part: Part) -> None:
        """Begins to read a part into the memory that it was given."""
        part.busy = "loading"
        self._readers.submit(self._read, part)

    def _read(self, part: Part) -> None:
        """On a thread of its own, without the monitor."""
        error: Exception | None = None
        try:
            part.load()
        except ServerError as failed:
            error = failed
        except Exception as failed:
            error = StorageFailed(f"cannot read {part.label} back: {failed}")
        with self._monitor:
            part.busy = None
            part.error = error
            self.bytes_read += part.nbytes
            if error is not None:
                self._leave(part)
            elif not part.pins:
                self.idle(part)
            self.pump()
            self._monitor.changed()

    def save(self, part: Part, errors: list[StorageFailed]) -> None:
        """Begins to write a part that is in memory and stays there. errors: gets the error if it fails."""
        part.busy = "writing"
        self._writers.submit(self._write, part, part.stamp, errors)

    def _write(self, part: Part, stamp: int, errors: list[StorageFailed] | None) -> None:
        """On a thread of its own, without the monitor. errors: None if the part is to leave memory."""
        error: StorageFailed | None = None
        try:
            # A commit needs the checksums of what it has saved. It counts those of what left memory before from
            # the files: most of that changes again before there is a commit.
            part.save(counted=errors is not None)
        except StorageFailed as failed:
            error = failed
        except Exception as failed:
            error = StorageFailed(f"cannot spill {part.label}: {failed}")
        with self._monitor:
            part.busy = None
            if errors is None:
                self.leaving_bytes -= part.size
            if error is None:
                part.saved_stamp = stamp
                self.bytes_written += part.nbytes
            elif errors is not None:
                errors.append(error)
            elif not part.discarded:
                self._write_error = error
            if not part.pins:
                if errors is None and part.clean and not part.discarded:
                    self._leave(part)
                else:
                    self.idle(part)
            self.pump()
            self._monitor.changed()
        if part.discarded:
            part.remove_file()
