"""The link that always works: bytes in messages of about 1 MiB, over the connection that carries control."""

from collections.abc import Iterator, Sequence

import torch

from protos import MESSAGE_BYTES
from protos import zero_ps_pb2 as pb
from trainer.links.base import Candidate, Push
from trainer.links.buffers import copy_bytes, read_only_tensor
from trainer.links.streams import StreamLink
from trainer.server import Server


class GrpcLink(StreamLink):
    kind = "grpc"

    def _unpack(self, response: pb.PullResponse) -> Iterator[torch.Tensor]:
        if response.data:
            yield read_only_tensor(response.data)

    def _pack(self, push: Push, header: pb.PushHeader) -> Iterator[bytes]:
        return _messages(push.sources)


class GrpcCandidate(Candidate):
    kind = "grpc"

    def open(self, server: Server) -> GrpcLink:
        return GrpcLink(server.stub, server.address, server.session_id)


def _messages(sources: Sequence[torch.Tensor]) -> Iterator[bytes]:
    """The sources' bytes back to back, cut into messages; small sources share a message."""
    parts: list[bytes] = []
    room = MESSAGE_BYTES
    for source in sources:
        position = 0
        while position < source.numel():
            count = min(room, source.numel() - position)
            parts.append(copy_bytes(source, position, count))
            position += count
            room -= count
            if room == 0:
                yield b"".join(parts)
                parts, room = [], MESSAGE_BYTES
    if parts:
        yield b"".join(parts)
