"""Memory that trainers read where it is."""

import threading

import torch

from protos.segment import Arena


class Lent:
    """A tensor in an arena, and how many readers may be looking at it.

    While there is any, its bytes must not change: what replaces them goes elsewhere.
    """

    def __init__(self, arena: Arena, tensor: torch.Tensor) -> None:
        self.arena = arena
        self.tensor = tensor
        offset = arena.offset_of(tensor)
        assert offset is not None
        self.offset = offset
        self.readers = 0
        self._lock = threading.Lock()

    def lend(self) -> None:
        with self._lock:
            self.readers += 1

    def give_back(self) -> None:
        with self._lock:
            self.readers -= 1
