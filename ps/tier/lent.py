"""Memory that others read where it is."""

import threading

import torch


class Lent:
    """A tensor, and how many readers may be looking at it.

    While there is any, its bytes must not change: what replaces them goes elsewhere.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.readers = 0
        self._lock = threading.Lock()

    def lend(self) -> None:
        with self._lock:
            self.readers += 1

    def give_back(self) -> None:
        with self._lock:
            self.readers -= 1
