"""gRPC's errors as this package's."""

import grpc

from trainer.errors import (
    AccessDenied,
    ConfigError,
    ConnectError,
    DeadlineExceeded,
    RequestRefused,
    ServerFailure,
    ServerFull,
    TrainerLost,
    ZeroPsError,
)


def from_rpc_error(error: grpc.RpcError, address: str) -> ZeroPsError:
    """The error of a failed call to the server at `address`."""
    # Errors of calls are calls too, which the types do not say.
    code = getattr(error, "code", lambda: grpc.StatusCode.UNKNOWN)()
    details = getattr(error, "details", lambda: str(error))()
    return from_stream_error(address, code, details or "no details")


def from_stream_error(address: str, code: grpc.StatusCode | int, message: str) -> ZeroPsError:
    """The error for a status that the server at `address` gave, as a code or its number."""
    if isinstance(code, int):
        code = next((c for c in grpc.StatusCode if c.value[0] == code), grpc.StatusCode.UNKNOWN)
    text = f"server {address}: {message}"
    match code:
        case grpc.StatusCode.UNAVAILABLE:
            return ConnectError(
                f"{text}; the server is gone or the network is cut. Start it again with the same "
                "--data-dir, then start the trainers again: they go on from the last commit"
            )
        case grpc.StatusCode.CANCELLED:
            return ConnectError(text)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded(text)
        case grpc.StatusCode.ABORTED:
            return TrainerLost(text)
        case grpc.StatusCode.INVALID_ARGUMENT:
            return ConfigError(text)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return ServerFull(text)
        case grpc.StatusCode.DATA_LOSS | grpc.StatusCode.INTERNAL | grpc.StatusCode.UNKNOWN:
            return ServerFailure(text)
        case grpc.StatusCode.UNAUTHENTICATED | grpc.StatusCode.PERMISSION_DENIED:
            return AccessDenied(text)
        case grpc.StatusCode.UNIMPLEMENTED:
            return ConnectError(f"{text}; is it a zero-ps server of this version?")
    return RequestRefused(text)
