"""From which step a job goes on: all servers are brought to one state."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from protos import zero_ps_pb2 as pb
from trainer.errors import NoCommonState
from trainer.server import Server, call_all, new_id

if TYPE_CHECKING:
    from trainer.job import Job


def resume(job: "Job", timeout: float) -> None:
    """Brings the servers to one state, and the job's `step`, `exists`, `metadata` and `complete` to what it is.

    Servers that have the same in memory go on from there; else all load the newest commit that each of them has.
    Rank 0 does it, and every rank waits for that. timeout: seconds.

    Raises NoCommonState, on every rank, where there is nothing to go on from.
    """
    resumed: dict[str, Any] = {}
    if job.rank == 0 or job.read_only:
        try:
            if job.read_only and _in_training(job.servers, job.connection.states, job.name):
                resumed = _newest(job.connection.states)
            else:
                resumed = _bring_to_one_state(job.servers, job.connection.states, job.name, timeout)
        except NoCommonState as error:
            if job.read_only or job.world_size == 1:
                raise
            resumed = {"error": str(error)}
    if not job.read_only:
        resumed = json.loads(job.barrier("resume", json.dumps(resumed).encode(), timeout)[0])
    if "error" in resumed:
        raise NoCommonState(resumed["error"])
    job.step = resumed["step"]
    job.exists = resumed["exists"]
    job.metadata = resumed["metadata"]
    job.complete = resumed["complete"] and tuple(resumed["complete"])
    job.restored = resumed["restored"]


def _in_training(servers: Sequence[Server], states: Sequence[pb.OpenSessionResponse], job: str) -> bool:
    """Whether trainers are at work on what all servers have in memory, so that steps can differ only as long as one
    is being made."""
    return (
        all(job in server.in_training for server in servers)
        and all(state.step >= 0 for state in states)
        and len({state.restore_id for state in states}) == 1
    )


def _newest(states: Sequence[pb.OpenSessionResponse]) -> dict[str, Any]:
    """For a reader, which changes nothing: servers that have not made the last step yet are about to."""
    newest = max(states, key=lambda state: state.step)
    return _state(newest.step, newest.metadata, _newest_commit(states, newest.step))


def _newest_commit(states: Sequence[pb.OpenSessionResponse], step: int) -> tuple[int, str] | None:
    """That every server has, and that is not of a later step."""
    older = [commit for commit in _common_commits(states) if commit[0] <= step]
    return older[-1] if older else None


def _bring_to_one_state(
    servers: Sequence[Server], states: Sequence[pb.OpenSessionResponse], job: str, timeout: float
) -> dict[str, Any]:
    """Says which state it is, whether there is any, which commit all of them have, and whether it had to be loaded."""
    common = _common_commits(states)
    steps = {state.step for state in states}
    # Memory at one step may still be of different runs, where a restore reached some servers only.
    if len(steps) == 1 and -1 not in steps and len({state.restore_id for state in states}) == 1:
        step, metadata = states[0].step, states[0].metadata
        return _state(step, metadata, _newest_commit(states, step))
    if steps == {-1} and not any(state.committed for state in states):
        return _state(0, "", None, exists=False)
    newest = common[-1][0] if common else -1
    for server, state in zip(servers, states, strict=True):
        damaged = [commit.step for commit in state.committed if not commit.commit_id]
        if damaged and damaged[-1] > newest:
            raise NoCommonState(
                f"server {server.address} cannot read its commit of step {damaged[-1]} of job {job!r}; its log names "
                "the file. Put it back from a copy, or move the generation's folder away to go on without it"
            )
    if not common:
        raise NoCommonState(_nothing_in_common(servers, states, job))
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
    return _state(step, restored[0].metadata, common[-1], restored=True)


def _state(
    step: int, metadata: str, complete: tuple[int, str] | None, *, exists: bool = True, restored: bool = False
) -> dict[str, Any]:
    return {
        "step": step,
        "exists": exists,
        "metadata": json.loads(metadata) if metadata else {},
        "complete": complete,
        "restored": restored,
    }


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
