"""The link that always works: bytes in messages of the Pull and Push streams."""

from collections.abc import Iterable, Iterator

from protos import MESSAGE_BYTES, frames
from protos import zero_ps_pb2 as pb
from ps.links.base import Block, Link, LinkKind


class GrpcLink(Link):
    """Cuts and packs bytes into messages of the size that gRPC moves fast."""

    kind = "grpc"

    def answer(self, request_id: int, blocks: Iterable[Block | None]) -> Iterator[tuple[bytes | pb.PullResponse, int]]:
        return messages(request_id, blocks)

    def received(self, header: pb.PushHeader) -> Iterator[memoryview]:
        return iter(())


class GrpcKind(LinkKind):
    kind = "grpc"

    def accept(self, offer: pb.LinkOffer) -> Link:
        return GrpcLink()


def messages(request_id: int, blocks: Iterable[Block | None]) -> Iterator[tuple[bytes, int]]:
    """Responses with the blocks' bytes back to back, cut into messages; small ones share one. At least one.

    Each with how many bytes it has of them.
    """
    parts: list[bytes] = []
    size, sent = 0, False
    for block in blocks:
        if block is not None:
            start = 0
            while start < block.num_bytes:
                stop = min(block.num_bytes, start + MESSAGE_BYTES - size)
                parts.append(block.read(start, stop))
                size += stop - start
                start = stop
                if size == MESSAGE_BYTES:
                    yield _message(request_id, size, parts)
                    parts, size, sent = [], 0, True
        elif parts:
            yield _message(request_id, size, parts)
            parts, size, sent = [], 0, True
    if parts or not sent:
        yield _message(request_id, size, parts)


def _message(request_id: int, size: int, parts: list[bytes]) -> tuple[bytes, int]:
    return b"".join((frames.pull_head(request_id, size), *parts)), size
