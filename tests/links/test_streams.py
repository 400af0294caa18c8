"""The trainer's end of the two streams, when answers and the end of the stream come at the same time."""

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import trainer
from protos import frames
from trainer.links import Pull
from trainer.links.channels import Channel
from trainer.links.streams import StreamLink

PULLS = 400


class Answers(Channel):
    """Answers all pulls as fast as they are read, once `begun`."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self._closed = threading.Event()

    def send(self, messages: Iterable[bytes]) -> None: ...

    def responses(self) -> Iterator[bytes]:
        self.begun.wait()
        for number in range(1, PULLS + 1):
            yield frames.pull_head(number, 1) + b"x"
        self._closed.wait()

    def close(self) -> None:
        self.begun.set()
        self._closed.set()


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("switching")
def test_nobody_waits_on_when_a_stream_fails_while_answers_come() -> None:
    server: Any = SimpleNamespace(address="here:1", session_id="s")
    for attempt in range(60):
        answers = Answers()
        link = StreamLink(server, answers, Answers())
        futures: list[Future[None]] = []
        for _ in range(PULLS):
            futures.append(link.pull(Pull(0, [(0, 0)], [torch.empty(1, dtype=torch.uint8)], None, 20.0)))
        answers.begun.set()
        time.sleep(attempt * 1e-4)
        link.fail(trainer.ConnectError("a test"))
        outcomes = [future.exception(20.0) for future in futures]
        assert all(error is None or str(error) == "a test" for error in outcomes), outcomes
        link.close()
