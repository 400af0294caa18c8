"""How tensor bytes travel between one trainer and one server."""

from trainer.links.base import Link, Pull, Push, PushKind, Run
from trainer.links.choice import Candidates, Shared
from trainer.links.outbox import Outbox

__all__ = ["Candidates", "Link", "Outbox", "Pull", "Push", "PushKind", "Run", "Shared"]
