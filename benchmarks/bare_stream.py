"""A gRPC stream of bytes and nothing else: what the `grpc` link is compared with. Run as a program it is the server."""

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import grpc

from protos import MAX_MESSAGE_BYTES, MESSAGE_BYTES

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]


@dataclass(frozen=True)
class BareStream:
    """A server process and a channel to it."""

    pid: int
    channel: grpc.Channel

    def pull(self, nbytes: int) -> float:
        """Receives that many bytes in messages of the links' size. Seconds."""
        method = self.channel.stream_stream("/bare/Pull", None, None)
        begin = time.perf_counter()
        received = sum(len(message) for message in method(iter([str(nbytes).encode()])))
        seconds = time.perf_counter() - begin
        assert received == nbytes
        return seconds

    def push(self, nbytes: int) -> float:
        """Sends that many bytes and waits for the one answer. Seconds."""
        method = self.channel.stream_stream("/bare/Push", None, None)
        begin = time.perf_counter()
        (answer,) = method(_messages(nbytes))
        seconds = time.perf_counter() - begin
        assert int(answer) == nbytes
        return seconds


@contextmanager
def bare_stream() -> Iterator[BareStream]:
    with subprocess.Popen([sys.executable, "-m", __name__], stdout=subprocess.PIPE, stdin=subprocess.PIPE) as server:
        assert server.stdout is not None
        try:
            address = server.stdout.readline().decode().strip()
            with grpc.insecure_channel(address, options=_OPTIONS) as channel:
                yield BareStream(server.pid, channel)
        finally:
            server.kill()


def _messages(nbytes: int) -> Iterator[bytes]:
    message = bytes(MESSAGE_BYTES)
    for _ in range(nbytes // MESSAGE_BYTES):
        yield message


def _pull(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    for request in requests:
        yield from _messages(int(request))


def _push(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    yield str(sum(len(request) for request in requests)).encode()


def _serve() -> None:
    server = grpc.server(ThreadPoolExecutor(4), options=_OPTIONS)
    handlers = {
        "Pull": grpc.stream_stream_rpc_method_handler(_pull),
        "Push": grpc.stream_stream_rpc_method_handler(_push),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"127.0.0.1:{port}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    _serve()
