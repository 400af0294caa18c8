"""How tensor bytes travel between one trainer and one server."""

from trainer.links.base import Link, Pull, Push, PushKind
from trainer.links.grpc import GrpcLink

__all__ = ["GrpcLink", "Link", "Pull", "Push", "PushKind"]
