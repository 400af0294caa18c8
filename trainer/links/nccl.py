"""The link between hosts with GPUs: NCCL, between the trainer's current device and one of the server."""

import torch

from protos import nccl, pair
from protos.nccl_pair import NcclPair
from protos.pair import Exchange, Pair
from trainer.links.base import LinkUnusable
from trainer.links.pair import PairCandidate


class NcclCandidate(PairCandidate):
    kind = "nccl"

    def _make(self, host: str, port: int, secret: str, exchange: Exchange) -> Pair:
        if why := nccl.why_not():
            raise LinkUnusable(why)
        return NcclPair(pair.TRAINER, current_device(), secret, exchange)


def current_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
