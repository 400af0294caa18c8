"""The link between hosts with GPUs: NCCL, between a device of the server and one of the trainer."""

import torch

from protos import nccl, pair
from protos import zero_ps_pb2 as pb
from protos.nccl_pair import NcclPair
from protos.pair import Exchange, Pair
from ps.errors import StartError
from ps.links.base import LinkRefused
from ps.links.pair import PairKind


class NcclKind(PairKind):
    """device: that the server stages parcels on; None where it has none."""

    kind = "nccl"

    def __init__(self, device: str | None = None) -> None:
        if device is None:
            raise LinkRefused("the server has no GPU (zero-ps serve --device)")
        super().__init__()
        self._device = torch.device(device)

    def _make(self, request: pb.PrepareLinkRequest, exchange: Exchange) -> Pair:
        return NcclPair(pair.SERVER, self._device, request.token, exchange)

    def _where(self, request: pb.PrepareLinkRequest) -> str:
        return f"on {self._device}"


def check_device(device: str) -> None:
    """Raises StartError for one that an nccl link cannot use, which `device`, a name such as 'cuda:0', has to be."""
    if why := nccl.why_not():
        raise StartError(f"--device {device} cannot be used: {why}; leave it away, or use a host with a GPU")
    count = torch.cuda.device_count()
    if (torch.device(device).index or 0) >= count:
        raise StartError(f"--device {device} is not there: torch finds {count} CUDA devices, numbered from 0")
    try:
        # What takes seconds when a device is used for the first time is done before the first trainer comes.
        torch.zeros(1, device=device)
    except RuntimeError as error:
        raise StartError(f"--device {device} cannot be used: {error}") from None
