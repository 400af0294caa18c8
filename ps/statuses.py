"""Errors as gRPC statuses, of calls and inside streams."""

import logging

import grpc

from protos import zero_ps_pb2 as pb
from ps.errors import OutOfBudget, ServerError, StorageFailed
from ps.store import StoreError

_MAX_MESSAGE_CHARS = 3000
"""Statuses travel in HTTP/2 headers, which gRPC limits to 8 KiB."""

_log = logging.getLogger(__name__)


def as_server_error(error: Exception) -> ServerError:
    """The error to answer with; anything unforeseen is logged and named after its type."""
    if isinstance(error, ServerError):
        return error
    if isinstance(error, StoreError):
        return StorageFailed(str(error))
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return OutOfBudget(f"the server is out of memory: {error}")
    _log.exception("unexpected error", exc_info=error)
    return ServerError(f"the server failed unexpectedly ({type(error).__name__}: {error}); its log says where")


def status_code(error: ServerError) -> grpc.StatusCode:
    return grpc.StatusCode[error.code]


def status_message(error: ServerError) -> str:
    return str(error)[:_MAX_MESSAGE_CHARS]


def stream_error(error: Exception) -> pb.Error:
    """The error as a message of a stream that goes on."""
    found = as_server_error(error)
    return pb.Error(code=status_code(found).value[0], message=status_message(found))
