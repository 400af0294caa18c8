"""Leases: parts that are in memory while somebody works with them."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType

from protos.sizes import format_bytes
from ps.monitor import Monitor, Patience
from ps.store.direct import page_aligned
from ps.tier.part import Part
from ps.tier.room import Room
from ps.tier.shares import Shares


class Lease:
    """Parts that are in memory until the block ends, and memory for what the block allocates itself."""

    def __init__(
        self,
        parts: Sequence[Part] = (),
        scratch_bytes: int = 0,
        release: Callable[["Lease"], None] = lambda lease: None,
    ) -> None:
        self.parts = parts
        self.scratch_bytes = scratch_bytes
        self._release = release

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._release(self)


ALWAYS = Lease()
"""The lease of parts that are in memory anyway."""


class Leases:
    """All leases of a tier: together they stay below their share, and the oldest that waits is first."""

    def __init__(self, room: Room, shares: Shares, monitor: Monitor) -> None:
        self._room = room
        self._shares = shares
        self._monitor = monitor
        self._queue: deque[Lease] = deque()

    def take(
        self, read: Iterable[Part], fresh: Iterable[Part], scratch_bytes: int, what: str, patience: Patience
    ) -> Lease:
        """See `Tier.lease`."""
        new = [part for part in fresh if part.spillable]
        parts = list(dict.fromkeys([*new, *(part for part in read if part.spillable)]))
        if not parts and not scratch_bytes:
            return ALWAYS
        lease = Lease(parts, page_aligned(scratch_bytes), self.release)
        what = what or (parts[0].label if parts else "a computation")
        self._shares.check_fits(sum(part.size for part in parts) + lease.scratch_bytes, what)
        with self._monitor:
            self._admit(lease, what, patience)
            try:
                self._fill(lease, set(new), what, patience)
            except BaseException:
                self.release(lease)
                raise
        return lease

    def release(self, lease: Lease) -> None:
        shares = self._shares
        with self._monitor:
            for part in lease.parts:
                part.pins -= 1
                if not part.pins:
                    shares.leased_bytes -= part.size
                    self._room.idle(part)
            shares.leased_bytes -= lease.scratch_bytes
            self._room.untake(lease.scratch_bytes)
            lease.parts, lease.scratch_bytes = (), 0
            self._room.pump()
            self._monitor.changed()

    def _admit(self, lease: Lease, what: str, patience: Patience) -> None:
        """Pins the parts once leases together stay below their limit; the oldest is first."""
        shares = self._shares

        def fits() -> bool:
            if self._queue[0] is not lease:
                return False
            new = lease.scratch_bytes + sum(part.size for part in lease.parts if not part.pins)
            return shares.leased_bytes + new <= shares.lease_limit_bytes

        self._queue.append(lease)
        try:
            self._monitor.wait_until(
                fits,
                patience,
                lambda: (
                    f"others to finish with {format_bytes(shares.leased_bytes)} in memory, so that {what} finds room"
                ),
            )
        finally:
            self._queue.remove(lease)
            self._monitor.changed()
        for part in lease.parts:
            if not part.pins:
                shares.leased_bytes += part.size
            part.pins += 1
        shares.leased_bytes += lease.scratch_bytes

    def _fill(self, lease: Lease, fresh: set[Part], what: str, patience: Patience) -> None:
        """Gives every part of a lease that was admitted its memory and its content."""
        if scratch := lease.scratch_bytes:
            # Until it is taken, `release` must not give it back.
            lease.scratch_bytes = 0
            self._shares.leased_bytes -= scratch
            self._room.wait(scratch, what, patience)
            self._room.take(scratch)
            self._shares.leased_bytes += scratch
            lease.scratch_bytes = scratch
        for part in lease.parts:
            part.error = None
            self._room.ahead_done(part)
        # Every read is under way before the first is waited for.
        for wait_for_it in (False, True):
            for part in lease.parts:
                self._begin(part, part in fresh, what, patience)
                if wait_for_it:
                    self._await(part, patience)
                    # Another lease was to load it, and gave up.
                    while part.buffer is None:
                        self._begin(part, part in fresh, what, patience)
                        self._await(part, patience)

    def _begin(self, part: Part, fresh: bool, what: str, patience: Patience) -> None:
        if part.buffer is not None or part.busy is not None:
            return
        # Claimed: other leases of the part wait for this one.
        part.busy = "loading"
        try:
            self._room.wait(part.size, what, patience)
        finally:
            part.busy = None
            self._monitor.changed()
        self._room.allocate(part)
        if fresh:
            part.filled = False
        elif part.filled:
            self._room.load(part)

    def _await(self, part: Part, patience: Patience) -> None:
        self._monitor.wait_until(
            lambda: part.busy != "loading", patience, lambda: f"the disk to read {part.label} back"
        )
        if part.error is not None:
            raise part.error
