"""The link between hosts without GPUs: a gloo process group of the server and one trainer."""

from protos import gloo_pair, pair
from protos import zero_ps_pb2 as pb
from protos.pair import Exchange, Pair
from ps.links.base import LinkRefused
from ps.links.pair import PairKind


class GlooKind(PairKind):
    """advertise: the address at which trainers reach this server; None for the one that each of them uses."""

    kind = "gloo"

    def __init__(self, advertise: str | None = None) -> None:
        if why := gloo_pair.why_not():
            raise LinkRefused(why)
        super().__init__()
        self._advertise = advertise

    def listening(self) -> pb.ServerLink:
        return pb.ServerLink(kind=self.kind, address=self._advertise or "")

    def _make(self, request: pb.PrepareLinkRequest, exchange: Exchange) -> Pair:
        return gloo_pair.GlooPair(pair.SERVER, self._advertise or request.host, request.token, exchange)

    def _where(self, request: pb.PrepareLinkRequest) -> str:
        return f"at {self._advertise or request.host!r}"
