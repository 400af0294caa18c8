"""`trainer.connect`: from server addresses to a job at the step where it goes on."""

import math
import os
from collections.abc import Sequence

from protos import names
from protos.credentials import Credentials
from protos.links import KINDS, parse_kinds
from trainer.errors import ConfigError
from trainer.job import Job
from trainer.membership import Wish
from trainer.recovery import connected
from trainer.server import parse_addresses


def connect(
    servers: str | Sequence[str],
    *,
    job: str = "default",
    rank: int | None = None,
    world_size: int | None = None,
    links: Sequence[str] | None = None,
    read_only: bool = False,
    elastic: bool = False,
    credentials: Credentials | None = None,
    connect_timeout: float = 20.0,
    timeout: float = 600.0,
) -> Job:
    """Joins a job on a set of parameter servers.

    A job that has state goes on where it is: from the servers' memory when all of them have it at the
    same step, else from the newest commit that every server has. `Job.step` says where that is.
    With several trainers every rank calls this; it returns when all have. A trainer that comes for a rank which another
    process has takes its place: the rest of the group hears of it and joins anew (`Job.recovering`).

    servers: "host:port,host:port" or a list; every server of the set, in any order.
    rank, world_size: default to torchrun's RANK and WORLD_SIZE, else to 0 and 1.
    links: the kinds of link that may be used; None allows all. Each server gets the best one that both sides can
        use; `Job.links` and `trainer.report` say which, and why no better one.
    read_only: only pull; takes part in no step.
    elastic: trainers may come and go while the job runs, in direct mode. `world_size` is the number to begin with;
        `Job.rank` and `Job.world_size` say what it is now. All trainers have to be, and the loop has to use
        `Job.recovering`. One that comes later waits, within connect_timeout, until the others are at a step boundary.
    credentials: for servers with TLS or tokens; None takes them from the environment (`Credentials.from_environment`).
    connect_timeout: seconds for the servers to answer and for all ranks to arrive.
    timeout: seconds that any later wait on a server or another trainer may take.

    Raises ConfigError for arguments that cannot work, ConnectError when servers cannot be reached, do
    not belong together or have no common state, RequestRefused when they do not accept this trainer, AccessDenied
    when that is for its token's sake.
    """
    rank, world_size = _group(rank, world_size)
    for name, seconds in (("connect_timeout", connect_timeout), ("timeout", timeout)):
        if not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
            raise ConfigError(f"{name} has to be a number of seconds above 0, not {seconds!r}")
    try:
        names.check_job_name(job)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    try:
        kinds = KINDS if links is None else parse_kinds([links] if isinstance(links, str) else links)
    except TypeError:
        raise ConfigError(f"links has to be a list of kinds, of {', '.join(KINDS)}, not {links!r}") from None
    except ValueError as error:
        raise ConfigError(f"links={links!r}: {error}") from None
    try:
        credentials = Credentials.from_environment() if credentials is None else credentials
    except ValueError as error:
        raise ConfigError(f"credentials from the environment: {error}") from None
    if elastic and read_only:
        raise ConfigError("elastic=True is for trainers that take part in steps; a reader is in no group anyway")
    wish = Wish(
        addresses=parse_addresses(servers),
        job=job,
        rank=rank,
        world_size=world_size,
        elastic=elastic,
        read_only=read_only,
        kinds=kinds,
        credentials=credentials,
    )
    return connected(Job(wish, timeout), connect_timeout)


def _group(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise ConfigError("give both rank and world_size, or neither to take them from RANK and WORLD_SIZE")
    if rank is None or world_size is None:
        try:
            rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        except ValueError:
            raise ConfigError(
                f"RANK={os.environ.get('RANK')!r} and WORLD_SIZE={os.environ.get('WORLD_SIZE')!r} have to be numbers"
            ) from None
    if world_size < 1 or not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} of world size {world_size} is not possible")
    return rank, world_size
