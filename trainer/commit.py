"""A commit that may still be under way: what `Job.commit` returns."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from trainer.errors import DeadlineExceeded, ZeroPsError
from trainer.server import Server


class Commit:
    """Says when every server has written its generation, and raises why not.

    step: the step that is committed.

    An error that nobody waited for is raised by the job's next `commit`, optimizer step or `close`.
    """

    def __init__(
        self,
        step: int,
        calls: Sequence[tuple[Server, "grpc.Future[Any]"]] = (),
        finish: Callable[[set[str]], None] = lambda ids: None,
    ) -> None:
        self.step = step
        self._calls = list(calls)
        self._finish = finish
        self._over = not self._calls
        self._error: ZeroPsError | None = None
        self._told = False

    def __repr__(self) -> str:
        if not self.done():
            return f"Commit(step={self.step}, under way)"
        self._collect()
        return f"Commit(step={self.step}, {'failed' if self._error else 'done'})"

    def done(self) -> bool:
        """Whether it is over, well or not. Does not block."""
        return self._over or all(call.done() for _, call in self._calls)

    def wait(self, timeout: float | None = None) -> None:
        """Returns when the commit survives the loss of every process.

        timeout: seconds; DeadlineExceeded after them, and the commit goes on. None: as long as it takes, at
            most the job's own timeout.
        Raises what a server said went wrong, every time. Training can go on then, and commit again.
        """
        if timeout is not None:
            end = time.monotonic() + timeout
            for server, call in self._calls:
                if not _ended(call, max(0.0, end - time.monotonic())):
                    raise DeadlineExceeded(
                        f"waited {timeout:g} s for server {server.address} to commit step {self.step}; it goes on, "
                        "so wait again"
                    )
        self._collect()
        self._told = True
        if self._error is not None:
            raise self._error

    def settle(self, *, block: bool) -> None:
        """For the job: raises the error if nobody has heard of it. block: wait for the end first."""
        if not block and not self.done():
            return
        self._collect()
        if self._error is not None and not self._told:
            self.wait()

    def _collect(self) -> None:
        """Takes the servers' answers, once."""
        if self._over:
            return
        ids = set()
        for server, call in self._calls:
            try:
                ids.add(server.finish(call).commit_id)
            except ZeroPsError as error:
                self._error = self._error or error
        self._over = True
        self._calls.clear()
        if self._error is None:
            try:
                self._finish(ids)
            except ZeroPsError as error:
                self._error = error


def _ended(call: "grpc.Future[Any]", timeout: float) -> bool:
    try:
        call.result(timeout)
    except grpc.FutureTimeoutError:
        return False
    except (grpc.RpcError, grpc.FutureCancelledError):
        pass
    return True
