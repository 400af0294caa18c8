"""The chunks of a commit while it is being written: each has to stay as it is until its bytes are away."""

from collections.abc import Iterable, Iterator

from ps.chunk import Chunk
from ps.monitor import Monitor, Patience


class Flush:
    """What one commit still has to write of a shard.

    Whoever is about to change a chunk asks `holds` with the job's `shard_lock` held, under which a commit
    begins; if it does, they let go of the lock and `settle`. Chunks that are written already, to the disk or into
    the page cache, may change while the commit goes on.

    version: of every chunk as it is written.
    """

    def __init__(self, what: str, version: int, chunks: Iterable[Chunk], monitor: Monitor) -> None:
        self.version = version
        self._what = what
        self._monitor = monitor
        # In the order in which they are to be written, and those of them that are being written.
        self._waiting = dict.fromkeys(chunks)
        self._writing: set[Chunk] = set()
        self._awaited: set[Chunk] = set()

    def __iter__(self) -> Iterator[Chunk]:
        """Hands out every chunk once, those that somebody waits for first."""
        while True:
            with self._monitor:
                chunk = next(iter(self._waiting), None)
                if chunk is None:
                    return
                del self._waiting[chunk]
                self._writing.add(chunk)
            yield chunk

    def taken(self, chunk: Chunk) -> None:
        """The chunk may change. From any thread."""
        with self._monitor:
            self._writing.discard(chunk)
            self._monitor.changed()

    def end(self) -> None:
        """The commit is over, well or not; nothing has to stay as it is for it."""
        with self._monitor:
            self._waiting.clear()
            self._writing.clear()
            self._monitor.changed()

    def awaits(self, chunk: Chunk) -> bool:
        """Whether somebody waits, or has waited, to change it."""
        with self._monitor:
            return chunk in self._awaited

    def holds(self, chunks: Iterable[Chunk]) -> bool:
        """Whether one of these still has to stay as it is."""
        with self._monitor:
            return any(chunk in self._waiting or chunk in self._writing for chunk in chunks)

    def settle(self, chunks: Iterable[Chunk], patience: Patience) -> None:
        """Has these written next and waits until they are. Raises Timeout."""
        chunks = list(chunks)
        with self._monitor:
            first = [chunk for chunk in chunks if chunk in self._waiting]
            self._waiting = dict.fromkeys([*first, *self._waiting])
            self._awaited.update(first)
        self._monitor.wait_until(
            lambda: not self.holds(chunks), patience, lambda: f"{self._what} to write {chunks[0].label}"
        )
