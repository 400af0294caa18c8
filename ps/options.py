"""What a server was told when it was started."""

from dataclasses import dataclass

from protos.links import KINDS

COMPRESSIBLE = ("weight", "buffer", "state")
"""Kinds of arrays that commits may compress."""


@dataclass(frozen=True)
class ServerOptions:
    """index: of the shard that this server holds, out of num_shards.

    keep: how many committed generations stay. lease_seconds: how long a silent trainer counts as alive.
    eviction: what leaves memory first where it is limited, 'plan' or 'lru'; the latter is to compare with.
    codecs: what chunk files of commits are compressed with, by kind of array: 'weight', 'buffer', 'state'. The same
        on all servers of a set.
    links: the kinds of link that trainers may use.
    advertise: the address at which trainers reach this server for other links than gRPC; None for the one that
        each of them uses.
    """

    index: int
    num_shards: int
    keep: int = 2
    lease_seconds: float = 10.0
    eviction: str = "plan"
    codecs: tuple[tuple[str, str], ...] = ()
    links: tuple[str, ...] = KINDS
    advertise: str | None = None
