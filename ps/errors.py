"""What a server can say went wrong. Each class has the gRPC status code by which a trainer tells them apart."""

from typing import ClassVar


class StartError(Exception):
    """The server cannot start; the message is for the person who started it."""


class ServerError(Exception):
    """Base of every error that is answered to a trainer; the message says what to do about it."""

    code: ClassVar[str] = "INTERNAL"


class InvalidRequest(ServerError):
    """A request that can never be right: a bad size, name, index or value."""

    code = "INVALID_ARGUMENT"


class Conflict(ServerError):
    """A request that does not fit the state that the server is in."""

    code = "FAILED_PRECONDITION"


class SessionEnded(ServerError):
    """The caller's own session was closed, fenced, lost its lease, or is not known here (any more)."""

    code = "NOT_FOUND"


class NotFound(ServerError):
    """A job, generation or array that this server does not have."""

    code = "FAILED_PRECONDITION"


class Unauthenticated(ServerError):
    """The caller did not say who it is, or nobody knows it."""

    code = "UNAUTHENTICATED"


class AccessDenied(ServerError):
    """The caller has not the right that a call takes."""

    code = "PERMISSION_DENIED"


class RankLost(ServerError):
    """Another trainer, without which the caller cannot go on, is gone."""

    code = "ABORTED"


class VersionGone(ServerError):
    """The chunk has moved past the version that was asked for."""

    code = "OUT_OF_RANGE"


class Leaving(ServerError):
    """The server was told to stop; it will do no more than what has begun."""

    code = "UNAVAILABLE"


class Timeout(ServerError):
    """The wait took longer than the caller allowed; the message names what was waited for."""

    code = "DEADLINE_EXCEEDED"


class Cancelled(ServerError):
    """The caller went away, or the server is shutting down, in the middle of a wait."""

    code = "CANCELLED"


class OutOfBudget(ServerError):
    """The shard cannot fit in the server's memory limit."""

    code = "RESOURCE_EXHAUSTED"


class ServerFull(ServerError):
    """The server has as many jobs or sessions as it may have."""

    code = "RESOURCE_EXHAUSTED"


class JobFailed(ServerError):
    """An optimizer step raised; the state in memory is not usable until a restore."""

    code = "INTERNAL"


class StorageFailed(ServerError):
    """A generation could not be read or written."""

    code = "DATA_LOSS"
