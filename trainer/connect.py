"""`trainer.connect`: from server addresses to a job at the step where it goes on."""

import json
import math
import os
from collections.abc import Sequence
from typing import Any

from protos import names
from protos import zero_ps_pb2 as pb
from protos.credentials import Credentials
from protos.links import KINDS, parse_kinds
from trainer.errors import ConfigError, ConnectError
from trainer.job import Job, new_id
from trainer.links import Candidates, Link, Shared
from trainer.server import Server, call_all, find_servers
from trainer.session import Session


def connect(
    servers: str | Sequence[str],
    *,
    job: str = "default",
    rank: int | None = None,
    world_size: int | None = None,
    links: Sequence[str] | None = None,
    read_only: bool = False,
    credentials: Credentials | None = None,
    connect_timeout: float = 20.0,
    timeout: float = 600.0,
) -> Job:
    """Joins a job on a set of parameter servers.

    A job that has state goes on where it is: from the servers' memory when all of them have it at the
    same step, else from the newest commit that every server has. `Job.step` says where that is.
    With several trainers every rank calls this; it returns when all have.

    servers: "host:port,host:port" or a list; every server of the set, in any order.
    rank, world_size: default to torchrun's RANK and WORLD_SIZE, else to 0 and 1.
    links: the kinds of link that may be used; None allows all. Each server gets the best one that both sides can
        use; `Job.links` and `trainer.report` say which, and why no better one.
    read_only: only pull; takes part in no step.
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
    except (TypeError, ValueError) as error:
        raise ConfigError(f"links={links!r}: {error}") from None
    try:
        credentials = Credentials.from_environment() if credentials is None else credentials
    except ValueError as error:
        raise ConfigError(f"credentials from the environment: {error}") from None
    found = find_servers(servers, credentials, connect_timeout)
    session = None
    candidates: list[Candidates] = []
    shared = Shared()
    opened: list[Link] = []
    try:
        for server in found:
            candidates.append(Candidates(server, shared, kinds))
        session = Session(
            found,
            [each.offers for each in candidates],
            job=job,
            rank=rank,
            world_size=world_size,
            read_only=read_only,
            timeout=connect_timeout,
        )
        for each, state in zip(candidates, session.states, strict=True):
            opened.append(each.open(state))
        result = Job(
            name=job,
            rank=rank,
            world_size=world_size,
            read_only=read_only,
            servers=found,
            session=session,
            links=opened,
            outbox=shared.outbox if any(link.kind == "shm" for link in opened) else None,
            timeout=timeout,
        )
        if shared.outbox is not None:
            shared.outbox.arena.stop_handing_over()
        resumed = _resume(found, session, job, timeout) if rank == 0 or read_only else {}
        if not read_only:
            resumed = json.loads(result.barrier("resume", json.dumps(resumed).encode(), connect_timeout)[0])
        result.step = resumed["step"]
        result.exists = resumed["exists"]
        result.metadata = resumed["metadata"]
        result.complete = resumed["complete"] and tuple(resumed["complete"])
        return result
    except BaseException:
        for link in opened:
            link.close()
        for each in candidates:
            each.close()
        if session is not None:
            session.close()
        for server in found:
            server.close()
        raise


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


def _resume(servers: Sequence[Server], session: Session, job: str, timeout: float) -> dict[str, Any]:
    """Brings all servers to one state. Says which, whether there is any, and which commit all of them have."""
    states = session.states
    common = _common_commits(states)
    steps = {state.step for state in states}
    # Memory at one step may still be of different runs, where a restore reached some servers only.
    if len(steps) == 1 and -1 not in steps and len({state.restore_id for state in states}) == 1:
        step, metadata = states[0].step, states[0].metadata
        older = [commit for commit in common if commit[0] <= step]
        return {"step": step, "exists": True, "metadata": _metadata(metadata), "complete": older[-1] if older else None}
    if steps == {-1} and not any(state.committed for state in states):
        return {"step": 0, "exists": False, "metadata": {}, "complete": None}
    newest = common[-1][0] if common else -1
    for server, state in zip(servers, states, strict=True):
        damaged = [commit.step for commit in state.committed if not commit.commit_id]
        if damaged and damaged[-1] > newest:
            raise ConnectError(
                f"server {server.address} cannot read its commit of step {damaged[-1]} of job {job!r}; its log names "
                "the file. Put it back from a copy, or move the generation's folder away to go on without it"
            )
    if not common:
        raise ConnectError(_nothing_in_common(servers, states, job))
    step, commit_id = common[-1]
    restore_id = new_id()
    restored = call_all(
        servers,
        "Restore",
        lambda server: pb.RestoreRequest(
            session_id=server.session_id, step=step, commit_id=commit_id, restore_id=restore_id
        ),
        timeout,
    )
    return {"step": step, "exists": True, "metadata": _metadata(restored[0].metadata), "complete": common[-1]}


def _common_commits(states: Sequence[pb.OpenSessionResponse]) -> list[tuple[int, str]]:
    """Step and id of the commits that every server has, the newest last."""
    first, *others = ([(c.step, c.commit_id) for c in state.committed if c.commit_id] for state in states)
    return [commit for commit in first if all(commit in other for other in others)]


def _nothing_in_common(servers: Sequence[Server], states: Sequence[pb.OpenSessionResponse], job: str) -> str:
    committed = [sorted({commit.step for commit in state.committed}) for state in states]
    held = "; ".join(
        f"{server.address} has step {state.step if state.step >= 0 else 'none'} in memory and commits {steps or 'none'}"
        for server, state, steps in zip(servers, states, committed, strict=True)
    )
    same = sorted(set.intersection(*map(set, committed)))
    if same:
        held += f" (their commits of step {same[-1]} are of different runs)"
    if any(committed):
        remedy = "Bring back the data folder that is missing, or begin anew under another job name"
    else:
        remedy = "Nothing was committed yet: restart the other servers too, and the job begins anew"
    return f"the servers have no step of job {job!r} in common: {held}. {remedy}"


def _metadata(text: str) -> dict[str, Any]:
    return dict(json.loads(text)) if text else {}
