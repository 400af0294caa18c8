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

from collections.abc import Iterable

import torch

from protos.sizes import format_bytes
from ps.errors import OutOfBudget, StorageFailed
from ps.monitor import Monitor, Patience
from ps.store import ChunkFile
from ps.tier.incoming import Arrivals, Incoming
from ps.tier.leases import ALWAYS, Lease, Leases
from ps.tier.part import Part
from ps.tier.policy import FarthestNextUse, Policy
from ps.tier.room import AHEAD_BYTES, Room
from ps.tier.shares import Shares

WAIT_SECONDS = 300.0
"""How long to wait for memory where a caller states no time."""


class Tier:
    """The memory of one server. Safe to use from all its threads.

    limit_bytes: None for no limit.
    """

    def __init__(self, limit_bytes: int | None = None, policy: Policy | None = None) -> None:
        self.limit_bytes = limit_bytes
        self._monitor = Monitor()
        self._reserved: dict[object, int] = {}
        self._shares = Shares(limit_bytes or 0)
        self._room: Room | None = None
        self._leases: Leases | None = None
        self._arrivals: Arrivals | None = None
        if limit_bytes is not None:
            self._room = Room(limit_bytes, policy or FarthestNextUse(), self._monitor)
            self._leases = Leases(self._room, self._shares, self._monitor)
            self._arrivals = Arrivals(self._room, self._shares, self._monitor)

    @property
    def limited(self) -> bool:
        return self._room is not None

    @property
    def incoming_limit_bytes(self) -> int:
        """The most that data on its way in may take."""
        return self._shares.incoming_limit_bytes

    @property
    def lease_limit_bytes(self) -> int:
        """The most that leases may take together."""
        return self._shares.lease_limit_bytes

    @property
    def ahead_limit_bytes(self) -> int:
        """How much is worth asking for before it is used."""
        return min((self.limit_bytes or 0) // 4, AHEAD_BYTES)

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
        if self._leases is None:
            return ALWAYS
        return self._leases.take(read, fresh, scratch_bytes, what, patience or Patience.of(WAIT_SECONDS))

    def check_fits(self, size: int, what: str) -> None:
        """Raises OutOfBudget if `size` bytes can never be in use together."""
        if self.limited:
            self._shares.check_fits(size, what)

    def check_arrives(self, size: int, what: str) -> None:
        """Raises OutOfBudget if `size` bytes can never come in together."""
        if self.limited:
            self._shares.check_arrives(size, what)

    # ------------------------------------------------------------ data on its way in

    def incoming(
        self, shape: tuple[int, ...], dtype: torch.dtype, what: str, patience: Patience | None = None
    ) -> Incoming:
        """Waits for memory for a tensor that is about to arrive. Raises OutOfBudget and Timeout."""
        if self._arrivals is None:
            return Incoming(torch.empty(shape, dtype=dtype), None)
        return self._arrivals.begin(shape, dtype, what, patience or Patience.of(WAIT_SECONDS))

    def give_back(self, incoming: Incoming) -> None:
        """What came in is not needed any more. Does nothing after `adopt`."""
        if self._room is None or self._arrivals is None or incoming.buffer is None:
            return
        with self._monitor:
            self._room.give(self._arrivals.end(incoming))
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
            assert self._room is not None and self._arrivals is not None
            self._monitor.wait_until(
                lambda: part.busy is None,
                Patience.of(WAIT_SECONDS),
                lambda: f"the disk to be done with {part.label}",
            )
            self._room.install(part, self._arrivals.end(incoming))
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

    def found(self, part: Part, file: ChunkFile) -> None:
        """The part's content is in a file that will not change; the part gets a name of its own for it.

        Its checksum is compared when it is first read.

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
        shares = self._shares
        with self._monitor:
            more = size - self._reserved.get(owner, 0)
            if more > shares.left_to_reserve_bytes:
                raise OutOfBudget(
                    f"{what} needs {format_bytes(size)} that cannot be spilled, and this server has "
                    f"{format_bytes(shares.left_to_reserve_bytes)} left for that of its --memory of "
                    f"{format_bytes(self.limit_bytes)}; give it more, or use more servers"
                )
            if more > 0:
                # Leases that were admitted before have a right to theirs.
                self._monitor.wait_until(
                    lambda: shares.leased_bytes + more <= shares.lease_limit_bytes,
                    patience or Patience.of(WAIT_SECONDS),
                    lambda: f"others to finish with {format_bytes(shares.leased_bytes)} in memory, for {what}",
                )
                shares.reserved_bytes += more
                try:
                    self._room.wait(more, what, patience or Patience.of(WAIT_SECONDS))
                except BaseException:
                    shares.reserved_bytes -= more
                    raise
                self._room.take(more)
            else:
                shares.reserved_bytes += more
                self._room.untake(-more)
            self._reserved[owner] = size
            self._monitor.changed()

    def unreserve(self, owner: object) -> None:
        """Gives back what an owner reserved."""
        if self._room is None:
            return
        with self._monitor:
            size = self._reserved.pop(owner, 0)
            self._shares.reserved_bytes -= size
            self._room.untake(size)
            self._room.pump()
            self._monitor.changed()
