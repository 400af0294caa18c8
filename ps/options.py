"""What a server was told when it was started."""

from dataclasses import dataclass

from protos.links import KINDS

MAX_JOBS = 256
"""Jobs that a server keeps in memory, so that a client that makes up names cannot fill it."""

MAX_SESSIONS = 256
"""Sessions that live at a time. Their calls and streams decide how many threads there may be; see `ps.places`."""

MAX_INFLIGHT_BYTES = 4 << 30
"""Of pushes of one session that have not arrived whole. A trainer pushes a parameter at a time."""

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
    late_updates: updates are put off as long as `max_staleness` permits; to see what that does to training.
    advertise: the address at which trainers reach this server for other links than gRPC; None for the one that
        each of them uses.
    device: a GPU of this server for nccl links, as in 'cuda:0'; None for none.
    max_jobs, max_sessions: in memory at a time. max_inflight_bytes: of one session's pushes that are arriving.
    """

    index: int
    num_shards: int
    keep: int = 2
    lease_seconds: float = 10.0
    eviction: str = "plan"
    codecs: tuple[tuple[str, str], ...] = ()
    links: tuple[str, ...] = KINDS
    advertise: str | None = None
    device: str | None = None
    max_jobs: int = MAX_JOBS
    max_sessions: int = MAX_SESSIONS
    max_inflight_bytes: int = MAX_INFLIGHT_BYTES
    late_updates: bool = False
