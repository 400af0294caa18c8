"""How tensor bytes travel between one trainer and one server."""

from trainer.links.base import Link, Pull, Push, PushKind, Run
from trainer.links.choice import Candidates

__all__ = ["Candidates", "Link", "Pull", "Push", "PushKind", "Run"]
