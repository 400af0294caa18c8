"""How tensor bytes travel between this server and its trainers. Control stays in the Pull and Push streams."""

from ps.links.base import Block, Claim, Link, LinkKind, LinkRefused, Read
from ps.links.choice import Chosen, Links
from ps.links.grpc import GrpcLink

__all__ = ["Block", "Chosen", "Claim", "GrpcLink", "Link", "LinkKind", "LinkRefused", "Links", "Read"]
