"""The link that always works: bytes in messages of the Pull and Push streams."""

from collections.abc import Generator, Iterable, Iterator

from protos import MESSAGE_BYTES, frames
from protos import zero_ps_pb2 as pb
from ps.links.base import Block, Claim, Link, LinkKind
from ps.tensor_bytes import joined

_SMALL_BYTES = 64 << 10
"""What is smaller is copied twice, so as to share a message; a message costs more than that."""


class GrpcLink(Link):
    """Cuts and packs bytes into messages of the size that gRPC moves fast."""

    kind = "grpc"

    def answer(self, request_id: int, blocks: Iterable[Block | None]) -> Iterator[tuple[bytes | pb.PullResponse, int]]:
        return messages(request_id, blocks)

    def received(self, header: pb.PushHeader, claim: Claim) -> Generator[memoryview | int, None, None]:
        yield from ()


class GrpcKind(LinkKind):
    kind = "grpc"

    def accept(self, offer: pb.LinkOffer) -> Link:
        return GrpcLink()


def messages(request_id: int, blocks: Iterable[Block | None]) -> Iterator[tuple[bytes, int]]:
    """Responses with the blocks' bytes back to back; small blocks share one, the others are cut. At least one.

    Each with how many bytes it has of them.
    """
    parts: list[bytes] = []
    size, sent = 0, False
    for block in blocks:
        small = block is not None and block.num_bytes < _SMALL_BYTES
        if parts and (not small or size > MESSAGE_BYTES - _SMALL_BYTES):
            yield _together(request_id, size, parts)
            parts, size, sent = [], 0, True
        if block is None:
            continue
        if small:
            parts.append(block.read(0, block.num_bytes))
            size += block.num_bytes
            continue
        yield from _cut(request_id, block)
        sent = True
    if parts or not sent:
        yield _together(request_id, size, parts)


def _cut(request_id: int, block: Block) -> Iterator[tuple[bytes, int]]:
    """A block in messages of its own. What can be lent is, so that it does not go on to another version in between."""
    with block.lent() as lent:
        for start in range(0, block.num_bytes, MESSAGE_BYTES):
            stop = min(start + MESSAGE_BYTES, block.num_bytes)
            head = frames.pull_head(request_id, stop - start)
            if lent is None:
                message = block.read(start, stop, head)
            else:
                message = joined(head, lent.tensor, block.start + start, block.start + stop)
            yield message, stop - start
            # Held here it would be in memory until the next one is there, too.
            del message


def _together(request_id: int, size: int, parts: list[bytes]) -> tuple[bytes, int]:
    return b"".join((frames.pull_head(request_id, size), *parts)), size
