"""A job as one trainer sees it."""

import atexit
import contextlib
import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from protos import MAX_METADATA_BYTES, names
from protos import zero_ps_pb2 as pb
from trainer.commit import Commit
from trainer.connection import Connection
from trainer.errors import ConfigError, ZeroPsError
from trainer.links import Link, Outbox
from trainer.membership import Wish
from trainer.recovery import BuffersBefore, recover, recovering
from trainer.server import Server, call_all, new_id
from trainer.transfer import Transfer

if TYPE_CHECKING:
    from trainer.offload import OffloadedModel


open_jobs: "weakref.WeakSet[Job]" = weakref.WeakSet()
"""Whose sessions end with this process; see `_leave`."""


@dataclass
class Stats:
    """What this process has moved since it connected, in bytes of tensors."""

    bytes_pulled: int = 0
    bytes_pushed: int = 0


class Job:
    """One model's training state on a set of servers. Made by `trainer.connect`; a context manager.

    name, read_only: as given to `connect`.
    rank, world_size: this trainer's place. In an elastic job they may be others after a recovery.
    step: how many optimizer steps the parameters have been through.
    exists: whether the servers have state of this job, so that a model's initial values do not count.
    metadata: the JSON object that was given to the commit that the state stems from.
    """

    def __init__(self, wish: Wish, timeout: float) -> None:
        """Not connected yet; see `trainer.recovery.connected`."""
        self.name = wish.job
        self.read_only = wish.read_only
        self.step = 0
        self.exists = False
        self.metadata: dict[str, object] = {}
        # Step and id of the newest commit that every server is known to have.
        self.complete: tuple[int, str] | None = None
        # Whether the state was loaded from a commit when this trainer was connected last.
        self.restored = False
        # The step after which the trainers of an elastic job regroup, as another one waits to join; 0 while none does.
        self.regroup_at = 0
        self.stats = Stats()
        self.timeout = timeout
        self.wish = wish
        self.connection: Connection
        self.transfer = Transfer(self)
        self.model: OffloadedModel | None = None
        # Why no more steps can be made, if so.
        self.broken: ZeroPsError | None = None
        # The last commit, which may be under way.
        self.last_commit = Commit(0)
        # How often in a row the body of `recovering` failed without a step, and where the last recovery went on.
        self.failures = 0
        self.recovered_at = -1
        self.buffers_before = BuffersBefore()
        self._barriers = 0
        self._closed = False
        open_jobs.add(self)

    @property
    def rank(self) -> int:
        return self.connection.place.rank

    @property
    def world_size(self) -> int:
        return self.connection.place.world_size

    @property
    def elastic(self) -> bool:
        return self.wish.elastic

    @property
    def servers(self) -> Sequence[Server]:
        return self.connection.servers

    @property
    def links(self) -> Sequence[Link]:
        return self.connection.links

    @property
    def outbox(self) -> Outbox | None:
        return self.connection.outbox

    @property
    def device(self) -> torch.device | None:
        return self.connection.device

    def __repr__(self) -> str:
        return f"Job({self.name!r}, step={self.step}, rank={self.rank}/{self.world_size}, servers={len(self.servers)})"

    def init(self) -> AbstractContextManager[None]:
        """Context in which a model is built without ever being whole in this process.

        Parameters leave for the servers as modules are built, with rank 0's values. Code in
        constructors that reads or changes a parameter which has left works: the parameter comes back
        for it. On a job that has state already the initial values are dropped instead.
        """
        from trainer.construction import construct

        return construct(self)

    def commit(
        self, metadata: Mapping[str, object] | None = None, *, wait: bool = True, tag: str | None = None
    ) -> Commit:
        """Makes the state at `step` durable: every server writes a generation. Returns when all have.

        Committed state survives the loss of every process. Rank 0 writes; on other ranks this returns
        at once.

        metadata: a JSON object to keep with the generation, as the position in the data; what
            `Job.metadata` gives back after a restart.
        wait: False to return while the servers write. What is committed is the state as it is now; the next
            passes and steps go on meanwhile. An error that nobody waits for is raised by the next commit,
            optimizer step or `close`.
        tag: a name that keeps the generation beyond `--keep`, until a later commit gets the same tag or
            `zero-ps untag` takes it away: letters, digits, '_', '-' and '.'.

        A commit waits for the one before. One that fails leaves the last one and the training as they are.
        """
        self.check()
        if self.read_only:
            raise ConfigError(f"job {self.name!r} was opened with read_only=True and cannot commit")
        if self.model is None:
            raise ConfigError(f"job {self.name!r} has no model yet: call trainer.offload(model, job) before commit()")
        self.model.announcement.check_none("commit()")
        text = _as_json(metadata or {})
        if len(text.encode()) > MAX_METADATA_BYTES:
            raise ConfigError(
                f"metadata is {len(text.encode())} bytes of JSON, at most {MAX_METADATA_BYTES} can be kept"
            )
        if tag is not None:
            try:
                names.check_tag(tag)
            except ValueError as error:
                raise ConfigError(str(error)) from None
        if self.rank != 0:
            return Commit(self.step)
        self.last_commit.settle(block=True)
        self.transfer.flush()
        self.model.write_buffers()
        request = self._commit_request(text)
        if tag is not None:
            request.tag = tag
        if not wait:
            # Once the state has gone on, servers that answer with an earlier commit cannot be asked again.
            request.renew = request.announce = True
            call_all(self.servers, "Commit", lambda server: _of_session(request, server), self.timeout + 5)
            request.announce = False
        self.last_commit = self._start_commit(request)
        if wait:
            self.last_commit.wait()
        return self.last_commit

    def _commit_request(self, metadata: str) -> pb.CommitRequest:
        request = pb.CommitRequest(step=self.step, metadata=metadata, commit_id=new_id(), timeout_seconds=self.timeout)
        if self.complete is not None:
            request.complete.CopyFrom(pb.CommittedGeneration(step=self.complete[0], commit_id=self.complete[1]))
            # New metadata is a new commit, also of a state that was committed already.
            request.renew = self.complete[0] == self.step and json.loads(metadata) != self.metadata
        return request

    def _start_commit(self, request: pb.CommitRequest) -> Commit:
        metadata: dict[str, object] = json.loads(request.metadata)

        def finish(ids: set[str]) -> None:
            if len(ids) > 1:
                # Some servers' part of the state was committed already, under another id. The generations of
                # a commit have one id, so those servers write theirs again.
                request.renew = True
                again = self._start_commit(request)
                again.wait()
                return
            self.complete = request.step, ids.pop()
            self.metadata = metadata

        calls = [
            (server, server.start("Commit", _of_session(request, server), self.timeout + 5)) for server in self.servers
        ]
        return Commit(request.step, calls, finish)

    def close(self) -> None:
        """Ends the session. The job stays on the servers; what was not committed stays in their memory.

        Waits for a commit that is under way, and raises its error if nobody has heard of it.
        """
        if self._closed:
            return
        try:
            self.last_commit.settle(block=True)
        finally:
            self._disconnect()

    def _disconnect(self) -> None:
        self._closed = True
        open_jobs.discard(self)
        if self.model is not None:
            self.model.leave()
        self.connection.close(self.step)

    def recover(self, timeout: float | None = None) -> int:
        """Joins the job anew after servers or other trainers were lost, with the same model and optimizer.

        Whatever was under way is dropped: the running step's gradients, and what is here of parameters. Waits for
        servers that are gone, and for the other trainers, which all join anew, too; in an elastic job for those that
        are still alive. Goes on as `trainer.connect` does: from the servers' memory if all have the same step there,
        else from the newest commit that all have. Returns that step, which is `step` from here on.

        timeout: seconds; None for the job's own. The error after them names what was waited for.
        """
        return recover(self, timeout)

    def recovering(
        self,
        on_rewind: Callable[[int], None] | None = None,
        *,
        on_lost: Callable[[ZeroPsError], None] | None = None,
        timeout: float | None = None,
    ) -> AbstractContextManager[None]:
        """Context of one training step, which recovers from the loss of servers and other trainers.

            while job.step < steps:
                with job.recovering():
                    x, y = batch(job.step)
                    loss_of(model(x), y).backward()
                    optimizer.step()
                    optimizer.zero_grad()

        An error inside that joining anew can mend (ConnectError, TrainerLost, SessionLost, StepHalfDone,
        DeadlineExceeded) ends the body, and not the program: `recover` is called, and the loop goes on at `step`, which
        may be an earlier one. All other errors pass, as does one that could not be mended within `timeout`. On entry
        the trainers of an elastic job take in one that waits to join.

        on_rewind: called with the step that comes next where a recovery made that another one than it would have been:
            the batch has to be made again, or an earlier one. Not needed where batches are functions of the step.
        on_lost: called with the error before anything is done about it.
        """
        return recovering(self, on_rewind, on_lost, timeout)

    def __enter__(self) -> "Job":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, Exception):
            # Ctrl-C: who is to end at once waits for no commit.
            self._disconnect()
            return
        try:
            self.close()
        except ZeroPsError as failed:
            if error is None:
                raise
            # What ended the block counts for more.
            error.add_note(f"and a commit failed: {failed}")

    def check_open(self) -> None:
        """Raises ConfigError after `close`."""
        if self._closed:
            raise ConfigError(f"job {self.name!r} is closed; connect again")

    def check(self) -> None:
        """Raises when this trainer can no longer work on the job."""
        self.check_open()
        if self.broken is not None:
            raise self.broken
        self.connection.session.check()

    def adopt(self, connection: Connection) -> None:
        """Has another connection from here on. What was under way over the former one is forgotten."""
        self.connection = connection
        weights, self.transfer = self.transfer.weights, Transfer(self)
        self.transfer.weights = weights
        self.broken = None
        self.last_commit = Commit(0)
        self.regroup_at = 0
        self._barriers = 0
        if self.model is not None:
            self.model.forget()

    def barrier(self, what: str, payload: bytes = b"", timeout: float | None = None) -> list[bytes]:
        """Waits for all ranks to call this at the same point and returns their payloads by rank.

        what: names the point in the error of a rank that waits in vain.
        """
        if self.world_size == 1:
            return [payload]
        self._barriers += 1
        timeout = self.timeout if timeout is None else timeout
        server = self.servers[0]
        request = pb.BarrierRequest(
            session_id=server.session_id,
            tag=f"{self.connection.place.group}.{self._barriers} {what}",
            payload=payload,
            timeout_seconds=timeout,
        )
        response: pb.BarrierResponse = server.call("Barrier", request, timeout + 5)
        return list(response.payloads)


def _of_session(request: pb.CommitRequest, server: Server) -> pb.CommitRequest:
    own = pb.CommitRequest()
    own.CopyFrom(request)
    own.session_id = server.session_id
    return own


def _as_json(metadata: Mapping[str, object]) -> str:
    try:
        return json.dumps(dict(metadata))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"metadata has to be a JSON object, with names as keys: {error}") from None


@atexit.register
def _leave() -> None:
    """Ends the sessions of a process that did not close its jobs, so that the others need not wait for its lease."""
    for job in list(open_jobs):
        with contextlib.suppress(Exception):
            job.connection.close(job.step)
