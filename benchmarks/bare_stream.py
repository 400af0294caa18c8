"""A gRPC stream of bytes and nothing else: what the `grpc` link is compared with. Run as a program it is the server.

There are two of them. One sends the same message again and again, which stays in the cache, and drops what it receives.
The other one cuts its messages from memory and copies what it receives to memory, of the sizes that the link has to
do with: the least that anybody with something to send can do.
"""

import itertools
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import grpc

from protos import MAX_MESSAGE_BYTES, MESSAGE_BYTES
from ps.process import keep_freed_blocks

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]


class _End:
    """Where messages come from and end."""

    def messages(self, nbytes: int) -> Iterator[bytes]:
        message = bytes(MESSAGE_BYTES)
        return itertools.repeat(message, nbytes // MESSAGE_BYTES)

    def receive(self, messages: Iterable[bytes]) -> int:
        """How many bytes came."""
        return sum(len(message) for message in messages)


class _MemoryEnd(_End):
    """In memory of so many bytes, whole messages, over and over."""

    def __init__(self, nbytes: int) -> None:
        # Written to, so that it has pages.
        self._memory = memoryview(bytearray(b"\1") * nbytes)

    def messages(self, nbytes: int) -> Iterator[bytes]:
        for position in range(0, nbytes, MESSAGE_BYTES):
            begin = position % len(self._memory)
            yield bytes(self._memory[begin : begin + MESSAGE_BYTES])

    def receive(self, messages: Iterable[bytes]) -> int:
        position = 0
        for message in messages:
            begin = position % len(self._memory)
            self._memory[begin : begin + len(message)] = message
            position += len(message)
        return position


@dataclass(frozen=True)
class BareStream:
    """A server process and a channel to it."""

    pid: int
    channel: grpc.Channel
    end: _End

    def pull(self, nbytes: int) -> float:
        """Receives that many bytes in messages of the links' size. Seconds."""
        method = self.channel.stream_stream("/bare/Pull", None, None)
        begin = time.perf_counter()
        received = self.end.receive(method(iter([str(nbytes).encode()])))
        seconds = time.perf_counter() - begin
        assert received == nbytes
        return seconds

    def push(self, nbytes: int) -> float:
        """Sends that many bytes and waits for the one answer. Seconds."""
        method = self.channel.stream_stream("/bare/Push", None, None)
        begin = time.perf_counter()
        (answer,) = method(self.end.messages(nbytes))
        seconds = time.perf_counter() - begin
        assert int(answer) == nbytes
        return seconds


@contextmanager
def bare_stream(memory_bytes: tuple[int, int] | None = None) -> Iterator[BareStream]:
    """memory_bytes: that messages come from and end in, in this process and at the server; None for no memory."""
    here, there = (_End(), []) if memory_bytes is None else (_MemoryEnd(memory_bytes[0]), [str(memory_bytes[1])])
    command = [sys.executable, "-m", __name__, *there]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE) as server:
        assert server.stdout is not None
        try:
            address = server.stdout.readline().decode().strip()
            with grpc.insecure_channel(address, options=_OPTIONS) as channel:
                yield BareStream(server.pid, channel, here)
        finally:
            server.kill()


def _serve(end: _End) -> None:
    def pull(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for request in requests:
            yield from end.messages(int(request))

    def push(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        yield str(end.receive(requests)).encode()

    server = grpc.server(ThreadPoolExecutor(4), options=_OPTIONS)
    handlers = {
        "Pull": grpc.stream_stream_rpc_method_handler(pull),
        "Push": grpc.stream_stream_rpc_method_handler(push),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"127.0.0.1:{port}", flush=True)
    sys.stdin.read()


def main(arguments: list[str]) -> None:
    if not arguments:
        _serve(_End())
        return
    # As the link's server does: pages that come and go cost more than the bytes in them.
    keep_freed_blocks()
    _serve(_MemoryEnd(int(arguments[0])))


if __name__ == "__main__":
    main(sys.argv[1:])
