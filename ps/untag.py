"""`zero-ps untag`: takes a tag away, so that what only it keeps may go."""

import sys
from collections.abc import Sequence
from pathlib import Path

from ps.store import DataDirError, JobStore, StoreError
from ps.store.claim import Claim


def untag(folders: Sequence[Path], job: str, tag: str) -> int:
    """Takes a tag away in servers' data folders, whether the servers run or not. Returns an exit status.

    What nothing else keeps is deleted with the next commit of the job.
    """
    try:
        servers: dict[Claim, list[Path]] = {}
        for folder in folders:
            claim = Claim.read(folder)
            if claim is None:
                raise DataDirError(f"{folder} is no server's data folder: it has no zero-ps.json; name --data-dir")
            servers.setdefault(Claim(claim.shard, claim.num_shards), []).append(folder)
        found = False
        for claim, paths in servers.items():
            for key in JobStore(paths, job, claim.shard, claim.num_shards).untag(tag):
                found = True
                print(f"shard {claim.shard}/{claim.num_shards}: {key} has lost the tag {tag!r}")
    except (StoreError, ValueError) as error:
        print(f"zero-ps untag: {error}", file=sys.stderr)
        return 2
    if not found:
        print(f"zero-ps untag: no commit of job {job!r} in these folders has the tag {tag!r}", file=sys.stderr)
    return 0 if found else 1
