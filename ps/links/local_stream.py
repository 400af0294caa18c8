"""One stream of requests over a socket of this host, answered by a thread of its own."""

import contextlib
import socket
import threading
from collections.abc import Iterator

from protos import MAX_MESSAGE_BYTES, local_messages
from ps.errors import InvalidRequest
from ps.links.base import Answer


class LocalStream:
    """The server's end of a stream."""

    def __init__(self, name: str, connection: socket.socket) -> None:
        self._name = name
        self._connection = connection
        self._lock = threading.Lock()
        self._served = False

    def serve(self, answer: Answer) -> None:
        """Answers what comes until the trainer closes its end, or is gone."""
        with self._lock:
            if self._connection.fileno() < 0:
                return
            self._served = True
        threading.Thread(target=self._serve, args=(answer,), name=f"shm {self._name}", daemon=True).start()

    def end_unserved(self) -> None:
        """The session has ended. One that is served goes on, to say why to whoever asks for something."""
        with self._lock:
            if not self._served:
                self._connection.close()

    def _serve(self, answer: Answer) -> None:
        connection = self._connection
        # Whoever sends last has gone when this fails, and there is nobody to be told.
        with connection, contextlib.suppress(OSError):
            try:
                answers = answer(self._requests(), self._cancel, lambda: local_messages.has_left(connection))
                with contextlib.closing(answers):
                    for piece in local_messages.framed(answers):
                        connection.sendall(piece)
            except local_messages.StreamError as failed:
                local_messages.send_error(connection, failed.error)

    def _requests(self) -> Iterator[bytes]:
        try:
            yield from local_messages.receive(self._connection, MAX_MESSAGE_BYTES)
        except (ValueError, local_messages.StreamError) as error:
            raise InvalidRequest(f"these are no requests: {error}") from None
        except OSError:
            # The trainer is gone.
            return

    def _cancel(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
