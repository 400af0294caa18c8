"""Messages that are mostly tensor bytes, written and read without protobuf's copies.

What travels is what `zero_ps.proto` says, byte for byte: these functions write the few bytes around the data
themselves, and recognise them. Anything else is left to protobuf.
"""

from dataclasses import dataclass

from protos import zero_ps_pb2 as pb

_REQUEST_ID = 0x08
_DATA = 0x12
"""Field 1 as a number and field 2 as bytes."""


@dataclass(frozen=True)
class Data:
    """A `PullResponse` or `PushRequest` that has nothing but data, in place of the message.

    request_id: 0 in a `PushRequest`. data: within the message that came.
    """

    request_id: int
    data: memoryview


def pull_head(request_id: int, size: int) -> bytes:
    """What stands before `size` bytes of data in a `PullResponse`."""
    return bytes([_REQUEST_ID]) + _varint(request_id) + push_head(size)


def push_head(size: int) -> bytes:
    """What stands before `size` bytes of data in a `PushRequest`."""
    return bytes([_DATA]) + _varint(size)


def encode(message: "bytes | pb.PullResponse | pb.PushRequest") -> bytes:
    """For gRPC: a message, or the bytes of one."""
    return message if isinstance(message, bytes) else message.SerializeToString()


def decode_pull(raw: bytes) -> "Data | pb.PullResponse":
    """For gRPC."""
    if raw[:1] == b"\x08":
        request_id, position = _read_varint(raw, 1)
        if (data := _only_data(raw, position)) is not None:
            return Data(request_id, data)
    return pb.PullResponse.FromString(raw)


def decode_push(raw: bytes) -> "Data | pb.PushRequest":
    """For gRPC."""
    data = _only_data(raw, 0)
    return pb.PushRequest.FromString(raw) if data is None else Data(0, data)


def _only_data(raw: bytes, position: int) -> memoryview | None:
    """The data, if that is all there is from `position` on."""
    if raw[position : position + 1] != b"\x12":
        return None
    size, begin = _read_varint(raw, position + 1)
    return memoryview(raw)[begin:] if begin + size == len(raw) else None


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _read_varint(raw: bytes, position: int) -> tuple[int, int]:
    """The number, and where it ends; a size that nothing has for one that does not end."""
    number = shift = 0
    for place in range(position, min(position + 10, len(raw))):
        number |= (raw[place] & 0x7F) << shift
        shift += 7
        if raw[place] < 0x80:
            return number, place + 1
    return len(raw) + 1, len(raw)
