"""A trainer's place among the trainers of a job, which shard 0 gives it."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from protos import PROTOCOL_VERSION
from protos import zero_ps_pb2 as pb
from protos.credentials import Credentials
from trainer.server import Server


@dataclass(frozen=True)
class Wish:
    """What a trainer connects with, the first time and every time after.

    addresses: of all servers, in any order. kinds: of links that may be used. credentials: of the servers.
    rank, world_size: in an elastic job of the beginning only.
    incarnation: unique for each process that connects.
    """

    addresses: str | Sequence[str]
    job: str
    rank: int
    world_size: int
    elastic: bool
    read_only: bool
    kinds: Sequence[str]
    credentials: Credentials
    incarnation: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class Place:
    """group: the number of the group, greater than that of any before; 0 for a reader, which is in none."""

    group: int
    rank: int
    world_size: int


def join_group(
    servers: Sequence[Server], wish: Wish, former: Place | None, timeout: float, *, keep_session: bool
) -> tuple[Place, float]:
    """Waits until this trainer's next group is formed. Its place there, and the seconds of its lease.

    It has a session with shard 0 from then on, which needs heartbeats.

    former: the place in the group before, if it was in one. keep_session: do not end that one before.
    """
    known = max(server.groups.get(wish.job, 0) for server in servers)
    place = former or Place(0, wish.rank, wish.world_size)
    request = pb.JoinGroupRequest(
        protocol_version=PROTOCOL_VERSION,
        job=wish.job,
        incarnation=wish.incarnation,
        rank=place.rank,
        world_size=place.world_size,
        elastic=wish.elastic,
        again=former is not None,
        known_group=max(known, place.group),
        former_group=place.group,
        keep_session=keep_session,
        timeout_seconds=timeout,
        shard=0,
        num_shards=len(servers),
    )
    # The server says itself for whom it waited in vain.
    response: pb.JoinGroupResponse = servers[0].call("JoinGroup", request, timeout + 5)
    servers[0].session_id = response.session_id
    return Place(response.group, response.rank, response.world_size), response.lease_seconds
