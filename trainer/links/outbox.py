"""Memory that this trainer's gradients leave from, shared with every server that reads it where it is."""

import torch

from protos.segment import Arena

SMALL_BYTES = 1 << 16
"""Below this a page of its own would mostly be waste; such gradients travel in messages."""


class Outbox:
    """Hands out blocks as `trainer.memory.MemoryPool` does, from memory that servers can read."""

    def __init__(self) -> None:
        """Raises OSError where the system gives no such memory."""
        self.arena = Arena()

    def take(self, nbytes: int) -> torch.UntypedStorage:
        """A storage of `nbytes` bytes with undefined content."""
        if nbytes >= SMALL_BYTES:
            try:
                return self.arena.take(nbytes).untyped_storage()
            except MemoryError:
                # It travels in messages then.
                pass
        return torch.empty(nbytes, dtype=torch.uint8).untyped_storage()

    def give(self, block: torch.UntypedStorage) -> None:
        """Returns what `take` gave. The arena notices by itself when nothing refers to it any more."""
