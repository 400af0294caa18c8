"""Which link a session gets: the best one that both sides can use, and why no better one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from protos import zero_ps_pb2 as pb
from protos.links import KINDS
from ps.errors import Conflict, InvalidRequest
from ps.links.base import Link, LinkKind, LinkRefused
from ps.links.gloo import GlooKind
from ps.links.grpc import GrpcKind
from ps.links.nccl import NcclKind
from ps.links.shm import ShmKind


@dataclass(frozen=True)
class Chosen:
    """A session's link. not_chosen: why each kind that would be better is not in use."""

    link: Link
    not_chosen: tuple[pb.LinkReason, ...] = ()


class Links:
    """The kinds of link that this server allows.

    advertise: the address at which trainers reach this server; None for the one that each of them uses.
    ruled_out: why, by kind, what would be allowed is not.
    device: a GPU of this server, as in 'cuda:0', for nccl links.
    """

    def __init__(
        self,
        allowed: Sequence[str] = KINDS,
        advertise: str | None = None,
        ruled_out: Mapping[str, str] = MappingProxyType({}),
        device: str | None = None,
    ) -> None:
        # The best first.
        self._kinds: dict[str, LinkKind] = {}
        self._unavailable: dict[str, str] = {}
        for kind in KINDS:
            if kind in ruled_out:
                self._unavailable[kind] = ruled_out[kind]
                continue
            if kind not in allowed:
                self._unavailable[kind] = "the server does not allow it (zero-ps serve --links)"
                continue
            try:
                self._kinds[kind] = _new_kind(kind, advertise, device)
            except LinkRefused as refused:
                self._unavailable[kind] = str(refused)

    def listening(self) -> list[pb.ServerLink]:
        return [kind.listening() for kind in self._kinds.values()]

    def prepare(self, request: pb.PrepareLinkRequest) -> pb.PrepareLinkResponse:
        """Raises InvalidRequest for a kind that this server has not."""
        kind = self._kinds.get(request.kind)
        if kind is None:
            raise InvalidRequest(f"this server has no {request.kind!r} link")
        return kind.prepare(request)

    def choose(self, offers: Sequence[pb.LinkOffer]) -> Chosen:
        """The link for a trainer that offers these. Raises Conflict, with every reason, if there is none."""
        by_kind = {offer.kind: offer for offer in offers or [pb.LinkOffer(kind="grpc")]}
        reasons: list[pb.LinkReason] = []
        for kind in KINDS:
            try:
                return Chosen(self._accept(kind, by_kind.get(kind)), tuple(reasons))
            except LinkRefused as refused:
                reasons.append(pb.LinkReason(kind=kind, reason=str(refused)[:_MAX_REASON_CHARS]))
        listed = "; ".join(f"{reason.kind}: {reason.reason}" for reason in reasons)
        raise Conflict(f"trainer and server have no link that both can use. {listed}")

    def _accept(self, kind: str, offer: pb.LinkOffer | None) -> Link:
        if offer is not None and offer.reason:
            raise LinkRefused(offer.reason)
        if kind in self._unavailable:
            raise LinkRefused(self._unavailable[kind])
        if offer is None:
            raise LinkRefused("the trainer does not know it")
        return self._kinds[kind].accept(offer)

    def close(self) -> None:
        for kind in self._kinds.values():
            kind.close()


_MAX_REASON_CHARS = 500


def _new_kind(kind: str, advertise: str | None, device: str | None) -> LinkKind:
    """Raises LinkRefused where the system lacks what it takes."""
    match kind:
        case "shm":
            return ShmKind()
        case "nccl":
            return NcclKind(device)
        case "gloo":
            return GlooKind(advertise)
        case "grpc":
            return GrpcKind()
    raise LinkRefused("this version has no such link")
