"""The link that always works: bytes in messages of the Pull and Push streams."""

from collections.abc import Iterable, Iterator

from protos import MESSAGE_BYTES
from protos import zero_ps_pb2 as pb
from ps.links.base import Block, Link, LinkKind


class GrpcLink(Link):
    """Cuts and packs bytes into messages of the size that gRPC moves fast."""

    kind = "grpc"

    def answer(self, blocks: Iterable[Block | None]) -> Iterator[tuple[pb.PullResponse, int]]:
        for data in messages(blocks):
            yield pb.PullResponse(data=data), len(data)

    def received(self, header: pb.PushHeader) -> Iterator[memoryview]:
        return iter(())


class GrpcKind(LinkKind):
    kind = "grpc"

    def accept(self, offer: pb.LinkOffer) -> Link:
        return GrpcLink()


def messages(blocks: Iterable[Block | None]) -> Iterator[bytes]:
    """The blocks' bytes back to back, cut into messages; small ones share one. At least one message."""
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
                    yield parts[0] if len(parts) == 1 else b"".join(parts)
                    parts, size, sent = [], 0, True
        elif parts:
            yield b"".join(parts)
            parts, size, sent = [], 0, True
    if parts or not sent:
        yield b"".join(parts)
