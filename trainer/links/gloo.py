"""The link between hosts without GPUs: a gloo process group of this trainer and one server."""

from protos import gloo_pair, pair
from protos.pair import Exchange, Pair
from trainer.links.base import LinkUnusable
from trainer.links.pair import PairCandidate


class GlooCandidate(PairCandidate):
    kind = "gloo"

    def _make(self, host: str, port: int, secret: str, exchange: Exchange) -> Pair:
        if why := gloo_pair.why_not():
            raise LinkUnusable(why)
        return gloo_pair.GlooPair(pair.TRAINER, gloo_pair.local_address(host, port), secret, exchange)
