"""Keeps what a server holds under its memory limit: parts come from disk when they are used, and leave again.

Whoever works with parts takes a `Lease`: all of them are then in memory and stay there. Three kinds of use
share the limit:

- leases, together at most `lease_limit_bytes`;
- data on its way in (`Incoming`), together at most `incoming_limit_bytes`;
- everything else that is in memory. It goes, clean parts at once and others when they are written, as soon
  as one of the former needs the room.

So a lease that was admitted needs nothing of what others hold to become whole, and who holds one can finish
whatever anybody else waits for. That rests on an order: a session's contributions, a job's `shard_lock`, a
lease, the job's monitor, a chunk, the tier's own lock. Nobody waits for a lease while holding a monitor or a
chunk, and nobody who holds a lease waits for another one, for a `shard_lock` or for contributions. Data on
its way in may be held by a trainer that has fallen silent; this is why it has a limit of its own.

Without a limit there is nothing to wait for, there are no threads and no files: parts are plain tensors.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

import torch

from protos.sizes import format_bytes
from ps.errors import OutOfBudget, StorageFailed
from ps.monitor import Monitor, Patience
from ps.tier.buffers import Buffer, page_aligned
from ps.tier.part import Part
from ps.tier.policy import FarthestNextUse, Policy
from ps.tier.room import AHEAD_BYTES, Room

WAIT_SECONDS = 300.0
"""How long to wait for memory where a caller states no time."""


class Lease:
    """Parts that are in memory until the block ends, and memory for what the block allocates itself."""

    def __init__(self, tier: "Tier", parts: Sequence[Part], scratch_bytes: int) -> None:
        self._tier = tier
        self.parts = parts
        self.scratch_bytes = scratch_bytes

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._tier.release(self)


class Incoming:
    """Memory for a tensor that is on its way in. It becomes a part's, or is given back."""

    def __init__(self, tensor: torch.Tensor, buffer: Buffer | None) -> None:
        self.tensor = tensor
        self.buffer = buffer


class Tier:
    """The memory of one server. Safe to use from all its threads.

    limit_bytes: None for no limit.
    """

    def __init__(self, limit_bytes: int | None = None, policy: Policy | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.incoming_limit_bytes = 0 if limit_bytes is None else limit_bytes // 4
        self._monitor = Monitor()
        self._room = None if limit_bytes is None else Room(limit_bytes, policy or FarthestNextUse(), self._monitor)
        self._reserved: dict[object, int] = {}
        self._reserved_bytes = 0
        self._leased_bytes = 0
        self._incoming_bytes = 0
        self._lease_queue: deque[object] = deque()
        self._incoming_queue: deque[object] = deque()

    @property
    def limited(self) -> bool:
        return self._room is not None

    @property
    def lease_limit_bytes(self) -> int:
        return (self.limit_bytes or 0) - self.incoming_limit_bytes - self._reserved_bytes

    @property
    def ahead_limit_bytes(self) -> int:
        """How much is worth asking for before it is used."""
        return min((self.limit_bytes or 0) // 2, AHEAD_BYTES)

    @property
    def resident_bytes(self) -> int:
        """What is taken of the limit."""
        return 0 if self._room is None else self._room.used_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that was ever resident, memory that waits to be used again included."""
        return 0 if self._room is None else self._room.peak_bytes

    @property
    def spilled_bytes(self) -> int:
        """What parts have on disk and not in memory."""
        return 0 if self._room is None else self._room.spilled_bytes

    @property
    def bytes_read(self) -> int:
        """From spill files, since the start."""
        return 0 if self._room is None else self._room.bytes_read

    @property
    def bytes_written(self) -> int:
        """To spill files, since the start."""
        return 0 if self._room is None else self._room.bytes_written

    def close(self) -> None:
        if self._room is not None:
            self._room.close()

    # ------------------------------------------------------------ leases

    def lease(
        self,
        read: Iterable[Part] = (),
        fresh: Iterable[Part] = (),
        *,
        scratch_bytes: int = 0,
        what: str = "",
        patience: Patience | None = None,
    ) -> Lease:
        """Waits until parts are in memory.

        read: with what they have. fresh: with anything in them; what they had is gone, and the caller fills
        them. scratch_bytes: memory that the caller takes besides.
        Raises OutOfBudget, naming `what`, for more than can ever be there; StorageFailed; Timeout.
        """
        room = self._room
        if room is None:
            return _ALWAYS
        new = [part for part in fresh if part.spillable]
        parts = list(dict.fromkeys([*new, *(part for part in read if part.spillable)]))
        if not parts and not scratch_bytes:
            return _ALWAYS
        lease = Lease(self, parts, page_aligned(scratch_bytes))
        what = what or (parts[0].label if parts else "a computation")
        self.check_fits(sum(part.size for part in parts) + lease.scratch_bytes, what)
        patience = patience or Patience.of(WAIT_SECONDS)
        with self._monitor:
            self._admit(lease, what, patience)
            try:
                self._fill(room, lease, set(new), what, patience)
            except BaseException:
                self.release(lease)
                raise
        return lease

    def check_fits(self, size: int, what: str) -> None:
        """Raises OutOfBudget if `size` bytes can never be in use together."""
        if self.limit_bytes is not None and size > self.lease_limit_bytes:
            least = -(-(size + self._reserved_bytes) * 4 // 3)
            raise OutOfBudget(
                f"{what} needs {format_bytes(size)} in memory at once, and this server has "
                f"{format_bytes(max(0, self.lease_limit_bytes))} for that: of its --memory of "
                f"{format_bytes(self.limit_bytes)}, {format_bytes(self.incoming_limit_bytes)} are for data on its way "
                f"in and {format_bytes(self._reserved_bytes)} for what is too small to spill; start it with --memory "
                f"{least} ({format_bytes(least)}) or more"
            )

    def check_arrives(self, size: int, what: str) -> None:
        """Raises OutOfBudget if `size` bytes can never come in together."""
        if self.limit_bytes is not None and page_aligned(size) > self.incoming_limit_bytes:
            least = 4 * page_aligned(size)
            raise OutOfBudget(
                f"{what} comes in {format_bytes(size)} at once, and this server takes in "
                f"{format_bytes(self.incoming_limit_bytes)}, a quarter of its --memory of "
                f"{format_bytes(self.limit_bytes)}; start it with --memory {least} ({format_bytes(least)}) or more"
            )

    def release(self, lease: Lease) -> None:
        with self._monitor:
            assert self._room is not None
            for part in lease.parts:
                part.pins -= 1
                if not part.pins:
                    self._leased_bytes -= part.size
                    self._room.idle(part)
            self._leased_bytes -= lease.scratch_bytes
            self._room.untake(lease.scratch_bytes)
            lease.parts, lease.scratch_bytes = (), 0
            self._room.pump()
            self._monitor.changed()

    def _admit(self, lease: Lease, what: str, patience: Patience) -> None:
        """Pins the parts once leases together stay below their limit; the oldest is first."""

        def fits() -> bool:
            if self._lease_queue[0] is not lease:
                return False
            new = lease.scratch_bytes + sum(part.size for part in lease.parts if not part.pins)
            return self._leased_bytes + new <= self.lease_limit_bytes

        self._lease_queue.append(lease)
        try:
            self._monitor.wait_until(
                fits,
                patience,
                lambda: (
                    f"others to finish with {format_bytes(self._leased_bytes)} in memory, so that {what} finds room"
                ),
            )
        finally:
            self._lease_queue.remove(lease)
            self._monitor.changed()
        for part in lease.parts:
            if not part.pins:
                self._leased_bytes += part.size
            part.pins += 1
        self._leased_bytes += lease.scratch_bytes

    def _fill(self, room: Room, lease: Lease, fresh: set[Part], what: str, patience: Patience) -> None:
        """Gives every part of a lease that was admitted its memory and its content."""
        if scratch := lease.scratch_bytes:
            # Until it is taken, `release` must not give it back.
            lease.scratch_bytes = 0
            self._leased_bytes -= scratch
            room.wait(scratch, what, patience)
            room.take(scratch)
            self._leased_bytes += scratch
            lease.scratch_bytes = scratch
        for part in lease.parts:
            part.error = None
            room.ahead_done(part)
        # Every read is under way before the first is waited for.
        for wait_for_it in (False, True):
            for part in lease.parts:
                self._begin(room, part, part in fresh, what, patience)
                if wait_for_it:
                    self._await(part, patience)
                    # Another lease was to load it, and gave up.
                    while part.buffer is None:
                        self._begin(room, part, part in fresh, what, patience)
                        self._await(part, patience)

    def _begin(self, room: Room, part: Part, fresh: bool, what: str, patience: Patience) -> None:
        if part.buffer is not None or part.busy is not None:
            return
        # Claimed: other leases of the part wait for this one.
        part.busy = "loading"
        try:
            room.wait(part.size, what, patience)
        finally:
            part.busy = None
            self._monitor.changed()
        room.allocate(part)
        if fresh:
            part.filled = False
        elif part.filled:
            room.load(part)

    def _await(self, part: Part, patience: Patience) -> None:
        self._monitor.wait_until(
            lambda: part.busy != "loading", patience, lambda: f"the disk to read {part.label} back"
        )
        if part.error is not None:
            raise part.error

    # ------------------------------------------------------------ data on its way in

    def incoming(
        self, shape: tuple[int, ...], dtype: torch.dtype, what: str, patience: Patience | None = None
    ) -> Incoming:
        """Waits for memory for a tensor that is about to arrive. Raises OutOfBudget and Timeout."""
        room = self._room
        if room is None:
            return Incoming(torch.empty(shape, dtype=dtype), None)
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        size = page_aligned(max(1, nbytes))
        self.check_arrives(size, what)
        patience = patience or Patience.of(WAIT_SECONDS)
        ticket = object()
        with self._monitor:
            self._incoming_queue.append(ticket)
            try:
                self._monitor.wait_until(
                    lambda: (
                        self._incoming_queue[0] is ticket and self._incoming_bytes + size <= self.incoming_limit_bytes
                    ),
                    patience,
                    lambda: f"{format_bytes(self._incoming_bytes)} on their way in, so that {what} finds room",
                )
                self._incoming_bytes += size
            finally:
                self._incoming_queue.remove(ticket)
                self._monitor.changed()
            try:
                room.wait(size, what, patience)
            except BaseException:
                self._incoming_bytes -= size
                raise
            buffer = room.buffer(size)
        return Incoming(buffer.view(shape, dtype, nbytes), buffer)

    def give_back(self, incoming: Incoming) -> None:
        """What came in is not needed any more. Does nothing after `adopt`."""
        if self._room is None or incoming.buffer is None:
            return
        with self._monitor:
            self._incoming_bytes -= incoming.buffer.size
            self._room.give(incoming.buffer)
            incoming.buffer = None
            self._room.pump()

    def adopt(self, part: Part, incoming: Incoming) -> torch.Tensor | None:
        """What came in becomes the content of a part of its dtype and size, without a copy.

        Expects that nobody reads or changes the part meanwhile. Returns memory that may be used again.
        """
        if not part.spillable:
            spare, part.plain = part.plain, incoming.tensor.view(part.shape)
            if incoming.buffer is not None:
                spare, part.plain = None, part.plain.clone()
                self.give_back(incoming)
            part.changed()
            return spare
        with self._monitor:
            assert self._room is not None and incoming.buffer is not None
            self._monitor.wait_until(
                lambda: part.busy is None,
                Patience.of(WAIT_SECONDS),
                lambda: f"the disk to be done with {part.label}",
            )
            self._room.install(part, incoming.buffer)
            incoming.buffer = None
            self._incoming_bytes -= part.size
            part.changed()
            if not part.pins:
                self._room.idle(part)
            self._room.pump()
            self._monitor.changed()
        return None

    def move(self, source: Part, target: Part) -> None:
        """Gives a part the content of another one of its size and dtype, which is discarded.

        Expects that nobody uses either meanwhile.
        """
        if self._room is None or not (source.spillable and target.spillable):
            target.plain = None if source.plain is None else source.plain.view(target.shape)
            target.changed()
            self.discard([source])
            return
        with self._monitor:
            self._monitor.wait_until(
                lambda: source.busy is None,
                Patience.of(WAIT_SECONDS),
                lambda: f"the disk to be done with {source.label}",
            )
            on_disk = source.clean and source.give_file(target)
            if source.buffer is not None:
                buffer = source.buffer
                self._room.lose(source)
                self._room.install(target, buffer)
                target.changed()
                self._room.idle(target)
            elif on_disk:
                self._room.spilled_bytes -= source.size
                target.changed()
                self._room.spilled_bytes += target.size
            if on_disk:
                target.saved_stamp = target.stamp
            source.filled = False
            source.discarded = True

    # ------------------------------------------------------------ parts

    def save(self, parts: Iterable[Part], patience: Patience | None = None) -> None:
        """Returns when parts that are spillable are on disk, in files that stay as they are until they change.

        Expects that nobody changes them meanwhile. Raises StorageFailed and Timeout.
        """
        if self._room is None:
            return
        patience = patience or Patience.of(WAIT_SECONDS)
        errors: list[StorageFailed] = []
        with self._monitor:
            waiting = [part for part in parts if part.spillable and part.filled and not part.clean]
            for part in waiting:
                self._monitor.wait_until(
                    lambda part=part: part.busy is None,  # type: ignore[misc]
                    patience,
                    lambda part=part: f"the disk to be done with {part.label}",  # type: ignore[misc]
                )
                if not part.clean:
                    self._room.save(part, errors)
            self._monitor.wait_until(
                lambda: bool(errors) or all(part.clean for part in waiting),
                patience,
                lambda: f"{sum(not part.clean for part in waiting)} tensors to be written to disk",
            )
        if errors:
            raise errors[0]

    def found(self, part: Part, file: Path) -> None:
        """The part's content is in a file that will not change; the part gets a name of its own for it.

        Raises StorageFailed.
        """
        assert self._room is not None
        part.link(file)
        with self._monitor:
            part.filled = True
            part.saved_stamp = part.stamp
            self._room.spilled_bytes += part.size

    def empty(self, part: Part) -> None:
        """What the part has is of no more use; the part itself is."""
        if self._room is None or not part.spillable:
            part.filled = False
            return
        with self._monitor:
            if part.filled and part.buffer is None:
                self._room.spilled_bytes -= part.size
            part.filled = False
            part.stamp += 1
            if not part.pins:
                self._room.idle(part)
            self._room.pump()
            self._monitor.changed()

    def discard(self, parts: Iterable[Part], *, files: bool = True) -> None:
        """Parts that nobody needs any more. Returns at once; the memory of one in use is free after that.

        files: False where the area that they are in is dropped anyway.
        """
        for part in parts:
            part.plain = None
            part.discarded = True
            self.empty(part)
            if files:
                part.remove_file()

    def ahead(self, parts: Iterable[Part]) -> None:
        """Parts that are needed soon, in this order. Returns at once.

        They are read while there is room, or something in memory that is needed later than they are.
        """
        if self._room is None:
            return
        with self._monitor:
            for part in parts:
                if part.spillable:
                    self._room.ahead(part)
            self._room.pump()

    def rank_again(self) -> None:
        """Forecasts have changed."""
        if self._room is None:
            return
        with self._monitor:
            self._room.rank_again()

    # ------------------------------------------------------------ what never leaves memory

    def reserve(self, owner: object, size: int, what: str, patience: Patience | None = None) -> None:
        """Sets how much an owner keeps in memory for good. Waits for the room. Raises OutOfBudget."""
        if self._room is None or self.limit_bytes is None:
            return
        with self._monitor:
            more = size - self._reserved.get(owner, 0)
            # What leases are for is not all to be taken away for good.
            left = (self.limit_bytes - self.incoming_limit_bytes) // 2 - self._reserved_bytes
            if more > left:
                raise OutOfBudget(
                    f"{what} needs {format_bytes(size)} that cannot be spilled, and this server has "
                    f"{format_bytes(max(0, left))} left for that of its --memory of {format_bytes(self.limit_bytes)}; "
                    "give it more, or use more servers"
                )
            if more > 0:
                # Leases that were admitted before have a right to theirs.
                self._monitor.wait_until(
                    lambda: self._leased_bytes + more <= self.lease_limit_bytes,
                    patience or Patience.of(WAIT_SECONDS),
                    lambda: f"others to finish with {format_bytes(self._leased_bytes)} in memory, for {what}",
                )
                self._reserved_bytes += more
                try:
                    self._room.wait(more, what, patience or Patience.of(WAIT_SECONDS))
                except BaseException:
                    self._reserved_bytes -= more
                    raise
                self._room.take(more)
            else:
                self._reserved_bytes += more
                self._room.untake(-more)
            self._reserved[owner] = size
            self._monitor.changed()

    def unreserve(self, owner: object) -> None:
        """Gives back what an owner reserved."""
        if self._room is None:
            return
        with self._monitor:
            size = self._reserved.pop(owner, 0)
            self._reserved_bytes -= size
            self._room.untake(size)
            self._room.pump()
            self._monitor.changed()


class _Always(Lease):
    """The lease of parts that are in memory anyway."""

    def __init__(self) -> None:
        self.parts = ()
        self.scratch_bytes = 0

    def __exit__(self, *error: object) -> None:
        pass


_ALWAYS = _Always()
