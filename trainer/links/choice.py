"""What a trainer offers each server, and the link that comes of it."""

from collections.abc import Sequence

from protos import zero_ps_pb2 as pb
from protos.links import KINDS
from trainer.links.base import Candidate, Link, LinkUnusable
from trainer.links.gloo import GlooCandidate
from trainer.links.grpc import GrpcCandidate
from trainer.links.nccl import NcclCandidate
from trainer.links.outbox import Outbox
from trainer.links.shm import ShmCandidate
from trainer.server import Server


class Shared:
    """What the links of one trainer have in common.

    outbox: made with the first link that needs it.
    """

    def __init__(self) -> None:
        self.outbox: Outbox | None = None

    def open_outbox(self) -> Outbox:
        self.outbox = self.outbox or Outbox()
        return self.outbox


class Candidates:
    """The kinds of link that may work between this trainer and one server."""

    def __init__(self, server: Server, shared: Shared, allowed: Sequence[str] = KINDS) -> None:
        """Tries what can be tried before there is a session."""
        self._server = server
        self._candidates: dict[str, Candidate] = {}
        self.offers: list[pb.LinkOffer] = []
        offered = {link.kind: link for link in server.links}
        try:
            for kind in KINDS:
                try:
                    if kind not in allowed:
                        raise LinkUnusable("the trainer does not allow it (links of trainer.connect)")
                    if kind in offered:
                        if self._candidates and kind != "grpc":
                            raise LinkUnusable(f"{next(iter(self._candidates))} is better, and was prepared")
                        self._candidates[kind] = _new_candidate(offered[kind], server, shared)
                        self.offers.append(self._candidates[kind].offer())
                    else:
                        # The server knows best why.
                        self.offers.append(pb.LinkOffer(kind=kind))
                except LinkUnusable as error:
                    self.offers.append(pb.LinkOffer(kind=kind, reason=str(error)))
        except BaseException:
            self.close()
            raise

    def open(self, state: pb.OpenSessionResponse) -> Link:
        """The link that the server chose. The others are given up."""
        # A server that answers nothing knows one kind.
        link = self._candidates.pop(state.link or "grpc").open(self._server)
        link.not_chosen = {reason.kind: reason.reason for reason in state.not_chosen}
        self.close()
        return link

    def close(self) -> None:
        while self._candidates:
            self._candidates.popitem()[1].close()


def _new_candidate(offered: pb.ServerLink, server: Server, shared: Shared) -> Candidate:
    """Raises LinkUnusable."""
    match offered.kind:
        case "shm":
            return ShmCandidate(offered.address, shared.open_outbox)
        case "nccl":
            return NcclCandidate(server)
        case "gloo":
            return GlooCandidate(server, offered.address)
        case "grpc":
            return GrpcCandidate()
    raise LinkUnusable("this version has no such link")
