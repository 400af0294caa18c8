"""A stream of messages to a server and back, over gRPC or over a socket of this host."""

import contextlib
import itertools
import queue
import socket
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator

import grpc

from protos import MAX_MESSAGE_BYTES, local_messages
from trainer.rpc import from_rpc_error, from_stream_error, gone
from trainer.server import Server


class Channel(ABC):
    """One thread reads `responses`; the rest may be called from any thread, `send` from one at a time."""

    @abstractmethod
    def send(self, messages: Iterable[bytes]) -> None:
        """Sends them behind what was sent before, without waiting for the server to take them.

        They are asked for when there is room for them, perhaps from another thread.
        """

    @abstractmethod
    def responses(self) -> Iterator[bytes]:
        """What the server answers. Raises this package's errors; ends without one where the server has ended it."""

    @abstractmethod
    def close(self) -> None:
        """Ends both directions, so that whoever reads `responses` comes to their end."""


class GrpcChannel(Channel):
    """method: of the service, "Pull" or "Push"."""

    def __init__(self, server: Server, method: str) -> None:
        self._address = server.address
        self._outgoing: queue.SimpleQueue[Iterable[bytes] | None] = queue.SimpleQueue()
        self._responses = server.stream(method, self._messages())

    def send(self, messages: Iterable[bytes]) -> None:
        self._outgoing.put(messages)

    def _messages(self) -> Iterator[bytes]:
        while (messages := self._outgoing.get()) is not None:
            yield from messages
            # Held here it would keep the last tensors alive until the next message.
            del messages

    def responses(self) -> Iterator[bytes]:
        try:
            yield from self._responses
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._address) from None

    def close(self) -> None:
        self._outgoing.put(None)
        self._responses.cancel()


class SocketChannel(Channel):
    """Whoever sends writes to the socket, which costs no other thread; only what the socket has no room for waits for
    a thread that is started then."""

    def __init__(self, address: str, connection: socket.socket) -> None:
        self._address = address
        self._connection = connection
        self._changed = threading.Condition()
        # What has no room yet, in pieces as they are written.
        self._backlog: deque[Iterator[bytes | memoryview]] = deque()
        self._writer: threading.Thread | None = None
        self._closed = False
        self._error: Exception | None = None

    def send(self, messages: Iterable[bytes]) -> None:
        pieces: Iterator[bytes | memoryview] = local_messages.framed(messages)
        with self._changed:
            if self._closed:
                return
            if not self._backlog:
                left = self._write_at_once(pieces)
                if left is None:
                    return
                pieces = itertools.chain([left], pieces)
            self._backlog.append(pieces)
            if self._writer is None:
                self._writer = threading.Thread(target=self._write, name=f"zero-ps {self._address}", daemon=True)
                self._writer.start()
            self._changed.notify()

    def _write_at_once(self, pieces: Iterator[bytes | memoryview]) -> memoryview | None:
        """What there is no room for of the first piece that is not written whole; None if all are."""
        for piece in pieces:
            try:
                written = self._connection.send(piece, socket.MSG_DONTWAIT)
            except BlockingIOError:
                written = 0
            except OSError:
                # Whoever reads the responses finds out.
                return None
            if written < len(piece):
                return memoryview(piece)[written:]
        return None

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._backlog or self._closed)
                if self._closed:
                    return
                pieces = self._backlog[0]
            try:
                for piece in pieces:
                    self._connection.sendall(piece)
            except OSError:
                return
            except Exception as error:  # a fault of ours must not leave anyone waiting
                self._error = error
                self.close()
                return
            with self._changed:
                # Closed meanwhile, it has none.
                if self._backlog:
                    self._backlog.popleft()
            del pieces

    def responses(self) -> Iterator[bytes]:
        with self._connection:
            try:
                yield from local_messages.receive(self._connection, MAX_MESSAGE_BYTES)
            except local_messages.StreamError as error:
                raise from_stream_error(self._address, error.error.code, error.error.message) from None
            except (OSError, ValueError) as error:
                raise gone(f"server {self._address}: {error}") from None
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._backlog.clear()
            self._changed.notify()
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
