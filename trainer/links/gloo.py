"""The link between hosts without GPUs: a gloo process group of this trainer and one server."""

from protos import gloo_pair, pair
from protos.pair import Exchange, Pair
from trainer.links.base import LinkUnusable
from trainer.links.pair import PairCandidate
from trainer.server import Server


class GlooCandidate(PairCandidate):
    """advertised: where the server says that it is reached; empty for where its calls go."""

    kind = "gloo"

    def __init__(self, server: Server, advertised: str = "") -> None:
        self._advertised = advertised
        super().__init__(server)

    def _make(self, host: str, port: int, secret: str, exchange: Exchange) -> Pair:
        if why := gloo_pair.why_not():
            raise LinkUnusable(why)
        host = self._advertised or host
        try:
            # On the way to the server's end, which may be another network than that of its calls.
            mine = gloo_pair.local_address(host, port)
        except OSError as error:
            raise LinkUnusable(f"there is no way to the server at {host!r}: {error}") from error
        return gloo_pair.GlooPair(pair.TRAINER, mine, secret, exchange)
