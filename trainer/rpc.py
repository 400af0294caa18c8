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
    ServerLost,
    SessionLost,
    TokenUnknown,
    TrainerLost,
    VersionGone,
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
            return gone(text)
        case grpc.StatusCode.UNKNOWN if message.startswith("Stream removed"):
            # As gRPC calls some ends of a connection.
            return gone(text)
        case grpc.StatusCode.CANCELLED:
            return ServerLost(text)
        case grpc.StatusCode.NOT_FOUND:
            return SessionLost(f"{text}; job.recovering() or job.recover() joins again, or start this trainer again")
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
        case grpc.StatusCode.OUT_OF_RANGE:
            return VersionGone(f"{text}. A reader goes on at the newest step with job.recovering() or job.recover()")
        case grpc.StatusCode.UNAUTHENTICATED:
            return TokenUnknown(
                f"{text}. A trainer that was connected before joins again with job.recovering() or job.recover() when "
                "the server knows its token"
            )
        case grpc.StatusCode.PERMISSION_DENIED:
            return AccessDenied(text)
        case grpc.StatusCode.UNIMPLEMENTED:
            return ConnectError(f"{text}; is it a zero-ps server of this version?")
    return RequestRefused(text)


def gone(text: str) -> ServerLost:
    """The error for a server that went away; text: which, and what was seen of that."""
    return ServerLost(
        f"{text}; the server is gone or the network is cut. Start it again with the same --data-dir: trainers whose "
        "loop uses job.recovering() wait for it, others are started again and go on from the last commit"
    )
