"""The link that always works: bytes in messages of about 1 MiB, over the connection that carries control."""

from trainer.links.base import Candidate
from trainer.links.streams import StreamLink
from trainer.server import Server


class GrpcLink(StreamLink):
    kind = "grpc"


class GrpcCandidate(Candidate):
    kind = "grpc"

    def open(self, server: Server) -> GrpcLink:
        return GrpcLink(server)
