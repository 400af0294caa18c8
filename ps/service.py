"""The gRPC service: requests in, checked; errors out, as statuses. What happens in between is the job's."""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import metadata
from typing import Any, TypeVar

import grpc

from protos import PROTOCOL_VERSION, SESSION_METADATA
from protos import zero_ps_pb2 as pb
from protos.frames import Data
from ps.access import Access
from ps.assembly import Applicant
from ps.commits import CommitRequest, announce, commit, restore
from ps.errors import Conflict, InvalidRequest, ServerError
from ps.job import Job
from ps.jobs import Jobs
from ps.links import Links
from ps.monitor import Patience
from ps.opening import open_job, set_optimizer
from ps.places import Place, Places
from ps.process import memory_bytes
from ps.pull import answer_pulls
from ps.push import answer_pushes, check_rank_0
from ps.session_streams import SessionStreams
from ps.sessions import Session
from ps.state_access import clear_state, list_state
from ps.statuses import as_server_error, status_code, status_message
from ps.traffic import Traffic
from ps.unreadable import Unreadable, readable
from ps.wire import (
    decode_chunks,
    decode_edits,
    decode_id,
    decode_key,
    decode_manifest,
    decode_optimizer,
    decode_plan,
    decode_reduction,
    decode_staleness,
    decode_step,
    encode_opened_job,
    encode_state,
)

Request = TypeVar("Request")
Response = TypeVar("Response")
_MAX_REASON_CHARS = 1000
Unary = Callable[["ParameterServer", Request, grpc.ServicerContext], Response]


def package_version() -> str:
    try:
        return metadata.version("zero-ps")
    except metadata.PackageNotFoundError:
        return "unknown"


def _at_once(method: Unary[Request, Response]) -> Unary[Request, Response]:
    """Answers a ServerError, and anything unforeseen, as a status. For calls that wait for nothing."""
    return _answered(method, lambda places, session_id: nullcontext())


def _call(method: Unary[Request, Response]) -> Unary[Request, Response]:
    """As `_at_once`, for calls that may wait, of which a session may have so many at a time."""
    return _answered(method, Places.call)


def _answered(
    method: Unary[Request, Response], place: Callable[[Places, str], AbstractContextManager[None]]
) -> Unary[Request, Response]:
    @functools.wraps(method)
    def wrapper(self: "ParameterServer", request: Request, context: grpc.ServicerContext) -> Response:
        with self.traffic.busy():
            try:
                if isinstance(request, Unreadable):
                    raise request.error
                with place(self._jobs.places, getattr(request, "session_id", "")):
                    return method(self, request, context)
            except Exception as error:
                failed = as_server_error(error)
        _abort(context, failed)
        raise AssertionError("abort raises")

    return wrapper


def _abort(context: grpc.ServicerContext, error: ServerError) -> None:
    context.abort(status_code(error), status_message(error))


def _patience(seconds: float, context: grpc.ServicerContext) -> Patience:
    return Patience.of(seconds, lambda: not context.is_active())


class ParameterServer:
    """See protos/zero_ps.proto for what each call does."""

    def __init__(self, jobs: Jobs, links: Links, access: Access | None = None) -> None:
        """access: asked before requests that do not come over gRPC; None where everybody may do everything."""
        self._jobs = jobs
        self._links = links
        self._access = access
        self.traffic = Traffic()

    @_at_once
    def Status(self, request: pb.StatusRequest, context: grpc.ServicerContext) -> pb.StatusResponse:
        rss, peak = memory_bytes()
        return pb.StatusResponse(
            package_version=package_version(),
            protocol_version=PROTOCOL_VERSION,
            shard=self._jobs.options.index,
            num_shards=self._jobs.options.num_shards,
            data_dir=", ".join(map(str, self._jobs.data_dir.paths)),
            rss_bytes=rss,
            peak_rss_bytes=peak,
            bytes_pulled=self.traffic.bytes_pulled,
            bytes_pushed=self.traffic.bytes_pushed,
            memory_limit_bytes=self._jobs.tier.limit_bytes or 0,
            resident_bytes=self._jobs.tier.resident_bytes,
            peak_resident_bytes=self._jobs.tier.peak_bytes,
            spilled_bytes=self._jobs.tier.spilled_bytes,
            spill_bytes_read=self._jobs.tier.bytes_read,
            spill_bytes_written=self._jobs.tier.bytes_written,
            links=self._links.listening(),
            jobs=[_job_status(job) for job in self._jobs.loaded()]
            + [
                pb.JobStatus(name=name, step=-1, committed_steps=steps, tags=tags)
                for name, steps, tags in self._jobs.stored()
            ],
        )

    # ------------------------------------------------------------ sessions

    @_call
    def PrepareLink(self, request: pb.PrepareLinkRequest, context: grpc.ServicerContext) -> pb.PrepareLinkResponse:
        return self._links.prepare(request)

    @_call
    def JoinGroup(self, request: pb.JoinGroupRequest, context: grpc.ServicerContext) -> pb.JoinGroupResponse:
        self._check_peer(request)
        if request.shard != 0:
            raise InvalidRequest("groups of trainers are formed at shard 0 alone")
        applicant = Applicant(
            incarnation=request.incarnation,
            rank=request.rank,
            world_size=request.world_size,
            elastic=request.elastic,
            again=request.again,
            known_group=request.known_group,
            former_group=request.former_group,
            keep_session=request.keep_session,
        )
        session = self._jobs.join_group(request.job, applicant, _patience(request.timeout_seconds, context))
        assert session.group is not None
        return pb.JoinGroupResponse(
            group=session.group.number,
            rank=session.rank,
            world_size=session.world_size,
            session_id=session.id,
            lease_seconds=session.lease_seconds,
        )

    def _check_peer(self, request: pb.OpenSessionRequest | pb.JoinGroupRequest) -> None:
        """Raises Conflict for a trainer of another version, or that takes this server for another one."""
        options = self._jobs.options
        if request.protocol_version != PROTOCOL_VERSION:
            raise Conflict(
                f"this server speaks version {PROTOCOL_VERSION} of the protocol, the trainer version "
                f"{request.protocol_version}; install the same zero-ps on both"
            )
        if (request.shard, request.num_shards) != (options.index, options.num_shards):
            raise Conflict(
                f"this server holds shard {options.index}/{options.num_shards}, the trainer expects shard "
                f"{request.shard}/{request.num_shards} here; name all servers, in the order of their shards"
            )

    @_call
    def OpenSession(self, request: pb.OpenSessionRequest, context: grpc.ServicerContext) -> pb.OpenSessionResponse:
        self._check_peer(request)
        chosen = self._links.choose(request.links)
        try:
            job, session = self._jobs.open_session(
                request.job,
                request.rank,
                request.world_size,
                request.incarnation,
                request.read_only,
                _patience(request.timeout_seconds, context),
                request.group,
            )
        except BaseException:
            chosen.link.close()
            raise
        job.use_link(session, chosen)
        streams = SessionStreams(self._jobs, self.traffic, session, self._access)
        chosen.link.serve(streams.pull, streams.push)
        shard = job.shard
        return pb.OpenSessionResponse(
            session_id=session.id,
            lease_seconds=session.lease_seconds,
            step=job.usable_step,
            committed=[
                pb.CommittedGeneration(step=key.step, commit_id=key.commit_id) for key in job.generations.committed()
            ],
            metadata="" if shard is None else shard.metadata,
            restore_id="" if shard is None else shard.restore_id,
            link=chosen.link.kind,
            not_chosen=chosen.not_chosen,
        )

    @_at_once
    def Heartbeat(self, request: pb.HeartbeatRequest, context: grpc.ServicerContext) -> pb.HeartbeatResponse:
        self._jobs.find(request.session_id)
        return pb.HeartbeatResponse()

    @_at_once
    def CloseSession(self, request: pb.CloseSessionRequest, context: grpc.ServicerContext) -> pb.CloseSessionResponse:
        job, session = self._jobs.find(request.session_id)
        job.close_session(session, request.step)
        return pb.CloseSessionResponse()

    @_at_once
    def EndGroup(self, request: pb.EndGroupRequest, context: grpc.ServicerContext) -> pb.EndGroupResponse:
        job, session = self._jobs.find(request.session_id)
        if session.read_only:
            raise InvalidRequest("a read-only session is of no group")
        job.end_group(session, request.reason[:_MAX_REASON_CHARS], passed_on=request.passed_on)
        return pb.EndGroupResponse()

    @_call
    def Barrier(self, request: pb.BarrierRequest, context: grpc.ServicerContext) -> pb.BarrierResponse:
        job, session = self._jobs.find(request.session_id)
        patience = _patience(request.timeout_seconds, context)
        return pb.BarrierResponse(payloads=job.barriers.gather(session, request.tag, request.payload, patience))

    # ------------------------------------------------------------ job

    @_call
    def Restore(self, request: pb.RestoreRequest, context: grpc.ServicerContext) -> pb.RestoreResponse:
        job, session = self._jobs.find(request.session_id)
        key, restore_id = decode_key(request.step, request.commit_id), decode_id(request.restore_id)
        return pb.RestoreResponse(metadata=restore(job, session, key, restore_id, self._update_wait(context)))

    @_call
    def OpenJob(self, request: pb.OpenJobRequest, context: grpc.ServicerContext) -> pb.OpenJobResponse:
        job, session = self._jobs.find(request.session_id)
        manifest, staging_ids = decode_manifest(request.manifest)
        return encode_opened_job(open_job(job, session, manifest, staging_ids))

    @_call
    def SetOptimizer(self, request: pb.SetOptimizerRequest, context: grpc.ServicerContext) -> pb.SetOptimizerResponse:
        job, session = self._jobs.find(request.session_id)
        spec, reduction = decode_optimizer(request), decode_reduction(request)
        staleness = decode_staleness(request)
        patience = self._update_wait(context)
        set_optimizer(job, session, spec, patience, request.trained, reduction, staleness, request.kept_rows)
        return pb.SetOptimizerResponse()

    # ------------------------------------------------------------ bytes

    def Pull(
        self, request_iterator: Iterable[pb.PullRequest | Unreadable], context: grpc.ServicerContext
    ) -> Iterator[bytes | pb.PullResponse]:
        with self._stream(context) as place:
            requests = readable(request_iterator)
            yield from answer_pulls(self._jobs, self.traffic, requests, place, lambda: not context.is_active())

    def Push(
        self, request_iterator: Iterable[Data | pb.PushRequest | Unreadable], context: grpc.ServicerContext
    ) -> Iterator[pb.PushResponse]:
        with self._stream(context) as place:
            requests: Iterator[Data | pb.PushRequest] = readable(request_iterator)
            yield from answer_pushes(self._jobs, self.traffic, requests, place, lambda: not context.is_active())

    @contextmanager
    def _stream(self, context: grpc.ServicerContext) -> Iterator[Place]:
        """A stream's place among the server's threads; what ends it as a whole ends it with a status."""
        try:
            metadata = {key: value for key, value in context.invocation_metadata() if key == SESSION_METADATA}
            session = self._jobs.find(str(metadata[SESSION_METADATA]))[1] if metadata else None
            with self._jobs.places.stream(context.cancel, session) as place:
                yield place
        except grpc.RpcError:
            # The client is gone.
            raise
        except Exception as error:
            failed = as_server_error(error)
        else:
            return
        _abort(context, failed)

    # ------------------------------------------------------------ steps and commits

    @_call
    def ZeroGrad(self, request: pb.ZeroGradRequest, context: grpc.ServicerContext) -> pb.ZeroGradResponse:
        job, session = self._jobs.find(request.session_id)
        shard = job.open_shard()
        job.steps.zero(session, shard, request.step, shard.select(request.parameters), request.keep_zeros)
        return pb.ZeroGradResponse()

    @_call
    def GradNorm(self, request: pb.GradNormRequest, context: grpc.ServicerContext) -> pb.GradNormResponse:
        job, session = self._jobs.find(request.session_id)
        patience = _patience(request.timeout_seconds, context)
        norms = job.norms.of(
            session,
            job.open_shard(),
            request.step,
            tuple(request.parameters),
            request.norm_type,
            decode_edits(request.edits),
            patience,
        )
        return pb.GradNormResponse(chunk_norms=norms)

    @_call
    def Step(self, request: pb.StepRequest, context: grpc.ServicerContext) -> pb.StepResponse:
        job, session = self._jobs.find(request.session_id)
        job.step_from(session, request.step, decode_step(request), self._update_wait(context))
        return pb.StepResponse(regroup_at=job.regroup_at)

    @_call
    def AnnounceStep(self, request: pb.AnnounceStepRequest, context: grpc.ServicerContext) -> pb.AnnounceStepResponse:
        job, session = self._jobs.find(request.session_id)
        if request.withdraw:
            job.steps.withdraw(session, job.open_shard(), request.step)
        else:
            done = decode_chunks(job.open_shard(), request.done)
            wish, patience = decode_step(request), self._update_wait(context)
            job.announce_step(session, request.step, wish, patience, done, zero_grad=request.zero_grad)
        return pb.AnnounceStepResponse()

    @_call
    def Plan(self, request: pb.PlanRequest, context: grpc.ServicerContext) -> pb.PlanResponse:
        job, session = self._jobs.find(request.session_id)
        job.set_plan(session, job.open_shard(), decode_plan(request))
        return pb.PlanResponse()

    @_call
    def Commit(self, request: pb.CommitRequest, context: grpc.ServicerContext) -> pb.CommitResponse:
        job, session = self._jobs.find(request.session_id)
        patience = _patience(request.timeout_seconds, context)
        key = decode_key(request.step, request.commit_id)
        complete = None
        if request.HasField("complete"):
            complete = decode_key(request.complete.step, request.complete.commit_id)
        asked = CommitRequest(key, request.metadata, complete, request.renew, request.tag)
        if request.announce:
            announce(job, session, asked, patience)
            return pb.CommitResponse()
        written = commit(job, session, asked, patience)
        return pb.CommitResponse(
            path=str(written.path), bytes_written=written.bytes_written, commit_id=written.key.commit_id
        )

    @_call
    def ListState(self, request: pb.ListStateRequest, context: grpc.ServicerContext) -> pb.ListStateResponse:
        job, session = self._jobs.find(request.session_id)
        patience = _patience(request.timeout_seconds, context)
        found = list_state(job, session, job.open_shard(), request.version, request.parameters, patience)
        return pb.ListStateResponse(chunks=[encode_state(chunk, arrays) for chunk, arrays in found])

    @_call
    def ClearState(self, request: pb.ClearStateRequest, context: grpc.ServicerContext) -> pb.ClearStateResponse:
        job, session = self._jobs.find(request.session_id)
        check_rank_0(job, session, "replaces optimizer state")
        clear_state(job, session, job.open_shard(), request.step, request.parameters)
        return pb.ClearStateResponse()

    @staticmethod
    def _update_wait(context: grpc.ServicerContext) -> Patience:
        """For calls that state no time: as long as the call's own deadline, if it has one."""
        left: Any = context.time_remaining()
        return _patience(300.0 if left is None else max(0.0, min(float(left), 1e6)), context)


def _job_status(job: Job) -> pb.JobStatus:
    shard = job.shard
    return pb.JobStatus(
        name=job.name,
        step=-1 if shard is None else shard.step,
        committed_steps=job.generations.steps(),
        parameters=0 if shard is None else len(shard.manifest),
        chunks=0 if shard is None else len(shard),
        resident_bytes=job.resident_bytes,
        sessions=[_session_status(session) for session in job.living_sessions()],
        tags=job.generations.tags(),
        group=job.sessions.number,
    )


def _session_status(session: Session) -> pb.SessionStatus:
    return pb.SessionStatus(
        rank=session.rank,
        world_size=session.world_size,
        seconds_since_heartbeat=session.seconds_silent,
        read_only=session.read_only,
        link=session.chosen.link.kind,
        not_chosen=session.chosen.not_chosen,
    )
