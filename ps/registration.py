"""Offers the service to gRPC: every call with protobuf's own codecs but the two streams of bytes."""

from typing import Any

import grpc
from google.protobuf.message_factory import GetMessageClass

from protos import MAX_MESSAGE_BYTES, frames, zero_ps_pb2
from ps.guard import Guard
from ps.service import ParameterServer
from ps.unreadable import MAX_REQUEST_BYTES, reader

_SERVICE = zero_ps_pb2.DESCRIPTOR.services_by_name["ParameterServer"]


def add_service(service: ParameterServer, server: grpc.Server, guard: Guard | None) -> None:
    """As the generated `add_ParameterServerServicer_to_server`, which knows no other codecs.

    guard: asked before each call; None where everybody may do everything.
    """
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
    for method in _SERVICE.methods:
        behaviour, request = getattr(service, method.name), GetMessageClass(method.input_type)
        if guard is not None:
            behaviour = (guard.stream if method.client_streaming else guard.unary)(method.name, behaviour)
        if method.client_streaming:
            decode = reader(
                method.name, frames.decode_push if method.name == "Push" else request.FromString, MAX_REQUEST_BYTES
            )
            handlers[method.name] = grpc.stream_stream_rpc_method_handler(behaviour, decode, frames.encode)
        else:
            response = GetMessageClass(method.output_type)
            most = MAX_MESSAGE_BYTES if method.name == "OpenJob" else MAX_REQUEST_BYTES
            handlers[method.name] = grpc.unary_unary_rpc_method_handler(
                behaviour, reader(method.name, request.FromString, most), response.SerializeToString
            )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE.full_name, handlers),))
