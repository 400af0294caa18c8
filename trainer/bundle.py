"""Small gradients that travel to a server together: a request costs both sides more than the bytes in it."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

from trainer.links import Push, PushKind

BUNDLE_BYTES = 64 << 10
"""Gradients of so many bytes are worth a request of their own."""

Done = Callable[["Future[None]"], None]


class Bundle:
    """Gradients that wait for others to travel with. What a request says once is the same for all of them.

    Not safe to use from several threads at once.
    """

    def __init__(self) -> None:
        self._pushes: list[Push] = []
        self._done: list[Done] = []
        self._nbytes = 0

    def takes(self, push: Push) -> bool:
        """Whether a push may wait here, and travel with the others.

        A final one does not wait: servers may update the parameter at once, while backward goes on.
        """
        if push.kind is not PushKind.GRADIENT or push.runs is not None or push.final or push.after:
            return False
        if self._pushes and _terms(push) != _terms(self._pushes[0]):
            return False
        return self._nbytes + num_bytes(push) < BUNDLE_BYTES

    def add(self, push: Push, done: Done) -> None:
        """done: called with the future of the request that it travels in."""
        self._pushes.append(push)
        self._done.append(done)
        self._nbytes += num_bytes(push)

    def take(self) -> tuple[Push, Done] | None:
        """All that is in here as one push, and what to call with its future; None if there is nothing."""
        pushes, done = self._pushes, self._done
        self._pushes, self._done, self._nbytes = [], [], 0
        if not pushes:
            return None
        push = replace(
            pushes[0],
            chunks=[chunk for each in pushes for chunk in each.chunks],
            sources=[source for each in pushes for source in each.sources],
        )

        def all_done(future: "Future[None]") -> None:
            for each in done:
                each(future)

        return push, all_done


def num_bytes(push: Push) -> int:
    return sum(source.numel() for source in push.sources)


def _terms(push: Push) -> tuple[object, ...]:
    return push.step, push.dtype, push.sequence
