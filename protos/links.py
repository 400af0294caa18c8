"""The kinds of link between a trainer and a server, which both sides rank alike."""

from collections.abc import Iterable

KINDS = ("shm", "nccl", "gloo", "grpc")
"""Every kind, the best first.

shm: memory that both processes share, on one host. nccl: between two GPUs. gloo: a process group of the two, over
TCP. grpc: messages over the connection that carries control; the one that always works.
"""


def parse_kinds(kinds: Iterable[str]) -> tuple[str, ...]:
    """The kinds named, the best first. Raises ValueError for one that does not exist, and for none."""
    named = {kind.strip() if isinstance(kind, str) else kind for kind in kinds}
    if unknown := sorted(named - set(KINDS), key=str):
        raise ValueError(f"{unknown[0]!r} is no kind of link; name one or more of {', '.join(KINDS)}")
    if not named:
        raise ValueError(f"no kind of link is named; name one or more of {', '.join(KINDS)}")
    return tuple(kind for kind in KINDS if kind in named)
