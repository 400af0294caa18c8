"""Messages that cannot be read. gRPC would answer them as a fault of the server; they are the client's."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import DecodeError

from protos.sizes import format_bytes
from ps.errors import InvalidRequest, ServerError, ServerFull

Message = TypeVar("Message")

MAX_REQUEST_BYTES = 24 << 20
"""Of every request but a manifest. The largest are an optimizer's groups, and what ranks exchange at a barrier.

A message may take many times its own size once it is read, so that small ones are not to be large.
"""


@dataclass(frozen=True)
class Unreadable:
    """In place of a request."""

    error: ServerError


def reader(method: str, decode: Callable[[bytes], Message], max_bytes: int) -> Callable[[bytes], Message | Unreadable]:
    """Decodes requests of a method, of at most so many bytes."""

    def read(raw: bytes) -> Message | Unreadable:
        if len(raw) > max_bytes:
            return Unreadable(
                ServerFull(f"a request of {method} may have {format_bytes(max_bytes)}, not {format_bytes(len(raw))}")
            )
        try:
            return decode(raw)
        except (DecodeError, ValueError) as error:
            return Unreadable(InvalidRequest(f"this is no request of {method}: {error}"))

    return read


def readable(requests: Iterable[Message | Unreadable]) -> Iterator[Message]:
    """A stream's requests. Raises what is wrong with one that cannot be read."""
    for request in requests:
        if isinstance(request, Unreadable):
            raise request.error
        yield request
