"""Stands before the calls of a server that has tokens: who calls, and may they?"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2

from protos import SESSION_METADATA
from protos import zero_ps_pb2 as pb
from ps.access import CALLS, Access, Of
from ps.errors import ServerError, Unauthenticated
from ps.sessions import Session
from ps.statuses import status_code, status_message
from ps.tokens import Right, Rules
from ps.unreadable import Unreadable

Behaviour = Callable[[Any, grpc.ServicerContext], Any]

_SERVICE = pb.DESCRIPTOR.services_by_name["ParameterServer"].full_name


class Gate(grpc.ServerInterceptor):  # type: ignore[type-arg]
    """Lets nobody in without a token, whatever the service, and before a message is read. `Guard` is behind it.

    check_health: answers the one call that takes no token.
    """

    def __init__(self, access: Access, check_health: Behaviour) -> None:
        self._access = access
        self._check_health = check_health

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], "grpc.RpcMethodHandler[Any, Any] | None"],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        service, _, method = handler_call_details.method.removeprefix("/").rpartition("/")
        if (service, method) == (health.SERVICE_NAME, "Check"):
            return self._health()
        try:
            caller = self._access.caller(handler_call_details.invocation_metadata)
            if service == health.SERVICE_NAME:
                # To watch takes a place among the server's calls for as long as one likes.
                pass
            elif service != _SERVICE:
                self._access.check_administrator(caller, service)
            elif method in CALLS:
                self._access.check_call(method, caller)
        except ServerError as error:
            return self._refusal(error)
        return continuation(handler_call_details)

    def _health(self) -> "grpc.RpcMethodHandler[Any, Any]":
        """Answers for the server as a whole, whatever is asked for, and without waiting for that: strangers who begin
        checks and never say of what would take the places of everybody's calls."""

        def check(requests: Iterable[bytes], context: grpc.ServicerContext) -> Iterator[Any]:
            yield self._check_health(health_pb2.HealthCheckRequest(), context)

        return grpc.stream_stream_rpc_method_handler(check, None, health_pb2.HealthCheckResponse.SerializeToString)

    def _refusal(self, error: ServerError) -> "grpc.RpcMethodHandler[Any, Any]":
        def refuse(requests: Iterable[bytes], context: grpc.ServicerContext) -> None:
            if isinstance(error, Unauthenticated):
                self._access.refusals.warn(context.peer())
            _abort(context, error)

        # As a stream, whose requests nobody asks for.
        return grpc.stream_stream_rpc_method_handler(refuse)


class Guard:
    """Puts `Access` before the behaviours of calls.

    session_of: the session of an id, whose lease it does not renew; None for an id that nobody has.
    """

    def __init__(self, access: Access, session_of: Callable[[str], Session | None]) -> None:
        self._access = access
        self._session_of = session_of

    def unary(self, method: str, behaviour: Behaviour) -> Behaviour:
        """A call with one request."""
        match CALLS[method].of:
            case Of.SOME_JOB:
                return self._of_some_job(method, behaviour)
            case Of.NEW_SESSION:
                return self._of_new_session(method, behaviour)
        return self._of_session(method, behaviour)

    def stream(self, method: str, behaviour: Behaviour) -> Behaviour:
        """A stream of requests, each of which is checked; one that is not allowed ends the stream."""

        def guarded(requests: Iterable[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            caller = self._caller(context)
            for key, value in context.invocation_metadata():
                if key == SESSION_METADATA:
                    self._checked(context, method, caller, str(value))
            return behaviour(self._requests(method, caller, requests), context)  # type: ignore[no-any-return]

        return guarded

    # ------------------------------------------------------------ what is asked before a call

    def _of_some_job(self, method: str, behaviour: Behaviour) -> Behaviour:
        def guarded(request: Any, context: grpc.ServicerContext) -> Any:
            caller = self._caller(context)
            response = behaviour(request, context)
            if isinstance(response, pb.StatusResponse):
                readable = [job for job in response.jobs if caller.allows(Right.READ, job.name)]
                response.ClearField("jobs")
                response.jobs.extend(readable)
            return response

        return guarded

    def _of_new_session(self, method: str, behaviour: Behaviour) -> Behaviour:
        def guarded(
            request: pb.OpenSessionRequest | pb.JoinGroupRequest | Unreadable, context: grpc.ServicerContext
        ) -> Any:
            caller = self._caller(context)
            if isinstance(request, Unreadable):
                return behaviour(request, context)
            try:
                read_only = isinstance(request, pb.OpenSessionRequest) and request.read_only
                self._access.check_new_session(method, caller, request.job, read_only)
            except ServerError as error:
                _abort(context, error)
            response: pb.OpenSessionResponse | pb.JoinGroupResponse = behaviour(request, context)
            session = self._session_of(response.session_id)
            if session is not None:
                # Before anybody has heard of the session.
                try:
                    self._access.take(session, caller)
                except ServerError as error:
                    _abort(context, error)
            return response

        return guarded

    def _of_session(self, method: str, behaviour: Behaviour) -> Behaviour:
        def guarded(request: Any, context: grpc.ServicerContext) -> Any:
            if not isinstance(request, Unreadable):
                self._checked(context, method, self._caller(context), request.session_id)
            return behaviour(request, context)

        return guarded

    def _requests(self, method: str, caller: Rules, requests: Iterable[Any]) -> Iterator[Any]:
        for request in requests:
            if (head := head_of(request)) is not None:
                self._access.check_session(method, caller.identity, self._session_of(head.session_id))
            yield request

    def _caller(self, context: grpc.ServicerContext) -> Rules:
        """Who was let in. The file may have changed since."""
        try:
            return self._access.caller(context.invocation_metadata())
        except ServerError as error:
            _abort(context, error)
            raise

    def _checked(self, context: grpc.ServicerContext, method: str, caller: Rules, session_id: str) -> None:
        try:
            self._access.check_session(method, caller.identity, self._session_of(session_id))
        except ServerError as error:
            _abort(context, error)


def head_of(request: object) -> pb.PullRequest | pb.PushHeader | None:
    """What names the session of a stream's request; None for what is only data, and belongs to the header before it."""
    if isinstance(request, pb.PushRequest):
        return request.header if request.HasField("header") else None
    return request if isinstance(request, pb.PullRequest) else None


def _abort(context: grpc.ServicerContext, error: ServerError) -> None:
    context.abort(status_code(error), status_message(error))
