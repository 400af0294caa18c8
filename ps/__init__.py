"""A parameter server: keeps one shard of a job's chunks, steps the optimizer on them, commits them.

From the outside in: `cli` and `server` run the process, `service` speaks gRPC, `job` is one job with its
sessions, steps and commits, `shard` and `chunk` are the state in memory, `store` is the state on disk.
`LocalCluster` starts servers as child processes of this one; `open_generation` reads what they committed.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ps.cluster import LocalCluster
    from ps.store.open_generation import open_generation

__all__ = ["LocalCluster", "open_generation"]


def __getattr__(name: str) -> object:
    # Loaded on demand: `import ps` stays cheap, and a server does not load what only its parent needs.
    match name:
        case "LocalCluster":
            from ps.cluster import LocalCluster

            return LocalCluster
        case "open_generation":
            from ps.store.open_generation import open_generation

            return open_generation
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
