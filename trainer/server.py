"""One server as a trainer sees it: its address, its channel, its calls."""

import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc

from protos import KEEPALIVE, MAX_MESSAGE_BYTES, PROTOCOL_VERSION, SESSION_METADATA
from protos import zero_ps_pb2 as pb
from protos import zero_ps_pb2_grpc as pb_grpc
from protos.credentials import Credentials
from protos.handshake import why_refused
from trainer.errors import ConfigError, ConnectError, ServerLost
from trainer.rpc import from_rpc_error

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Two jobs of one process must not share a connection: one's bulk would delay the other's control.
    ("grpc.use_local_subchannel_pool", 1),
    # A server that is started again is found soon. gRPC adds jitter.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 2000),
    ("grpc.max_reconnect_backoff_ms", 2000),
    *KEEPALIVE,
]


_SERVICE = pb.DESCRIPTOR.services_by_name["ParameterServer"].full_name

_DIAGNOSE_AFTER_SECONDS = 1.0
_DIAGNOSIS_SECONDS = 3.0
"""When a server that cannot be connected to is asked why, and for how long."""


class Server:
    """A connection to the parameter server at `address` ("host:port").

    Raises ConfigError for credentials that cannot be used with it.
    """

    def __init__(self, address: str, credentials: Credentials) -> None:
        self.address = address
        self._credentials = credentials
        self.session_id = ""
        # Called where a heartbeat finds out that the server is gone: a link that does not notice by itself.
        self.on_lost: Callable[[Exception], None] | None = None
        # What the server said of the kinds of link that it allows.
        self.links: Sequence[pb.ServerLink] = ()
        # By job, the newest group of trainers that the server knew of.
        self.groups: dict[str, int] = {}
        # Jobs that had trainers.
        self.in_training: set[str] = set()
        try:
            self._metadata = credentials.metadata(address)
            self._channel = credentials.open_channel(address, _OPTIONS)
        except ValueError as error:
            raise ConfigError(f"credentials for server {address}: {error}") from None
        self.stub = pb_grpc.ParameterServerStub(self._channel)

    def wait_ready(self, timeout: float) -> None:
        """Returns when the server answers; ConnectError, naming the address, after `timeout` seconds.

        At once where it answers and the two do not agree about TLS: waiting does not help there.
        """
        ready = grpc.channel_ready_future(self._channel)
        try:
            end = time.monotonic() + timeout
            while not _done_within(ready, min(_DIAGNOSE_AFTER_SECONDS, end - time.monotonic())):
                left = max(0.5, end - time.monotonic())
                if why := why_refused(self.address, self._credentials, min(_DIAGNOSIS_SECONDS, left)):
                    raise ConnectError(f"server {self.address}: {why}")
                if time.monotonic() >= end:
                    raise grpc.FutureTimeoutError
        except grpc.FutureTimeoutError:
            host, _, port = self.address.rpartition(":")
            try:
                socket.getaddrinfo(host.strip("[]"), int(port))
            except OSError as error:
                raise ConnectError(f"server {self.address}: the name does not resolve ({error.strerror})") from None
            raise ServerLost(
                f"no parameter server answers at {self.address} after {timeout:.2g} s; check the address and "
                f"that the server runs (zero-ps serve --shard I/N --data-dir DIR --listen {self.address})"
            ) from None

    def describe(self, timeout: float) -> pb.StatusResponse:
        """The server's status; ConnectError when it speaks another version of the protocol."""
        status: pb.StatusResponse = self.call("Status", pb.StatusRequest(), timeout)
        if status.protocol_version != PROTOCOL_VERSION:
            raise ConnectError(
                f"server {self.address} speaks protocol version {status.protocol_version} (zero-ps "
                f"{status.package_version}), this trainer speaks version {PROTOCOL_VERSION}; install the same "
                "zero-ps on both"
            )
        self.links = tuple(status.links)
        self.groups = {job.name: job.group for job in status.jobs}
        self.in_training = {job.name for job in status.jobs if any(not each.read_only for each in job.sessions)}
        return status

    def stream(self, method: str, requests: Iterator[bytes]) -> Any:
        """A bidirectional stream of encoded messages; its responses are an iterator that can be cancelled."""
        metadata = (*self._metadata, (SESSION_METADATA, self.session_id))
        return self._channel.stream_stream(f"/{_SERVICE}/{method}", None, None)(requests, metadata=metadata)

    def start(self, method: str, request: object, timeout: float) -> "grpc.Future[Any]":
        """Sends a unary call and returns its future."""
        call: grpc.Future[Any] = getattr(self.stub, method).future(request, timeout=timeout, metadata=self._metadata)
        return call

    def call(self, method: str, request: object, timeout: float) -> Any:
        """A unary call; raises this package's errors."""
        return self.finish(self.start(method, request, timeout))

    def finish(self, call: "grpc.Future[Any]") -> Any:
        try:
            return call.result()
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.address) from None

    def close(self) -> None:
        self._channel.close()


def _done_within(ready: "grpc.Future[Any]", seconds: float) -> bool:
    try:
        ready.result(timeout=max(0.0, seconds))
    except grpc.FutureTimeoutError:
        return False
    return True


def call_all(servers: Sequence[Server], method: str, request: Callable[[Server], object], timeout: float) -> list[Any]:
    """The same call to every server at once; the responses by shard.

    Waits for all of them also when one fails, so that no server is left with half of a conversation,
    and then raises the first error.
    """
    return finish_all(servers, [server.start(method, request(server), timeout) for server in servers])


def finish_all(servers: Sequence[Server], calls: Sequence["grpc.Future[Any]"]) -> list[Any]:
    """The responses of calls that were started, one to each server; as `call_all`."""
    responses: list[Any] = []
    failure: Exception | None = None
    for server, call in zip(servers, calls, strict=True):
        try:
            responses.append(server.finish(call))
        except Exception as error:
            failure = failure or error
    if failure is not None:
        raise failure
    return responses


def find_servers(addresses: str | Sequence[str], credentials: Credentials, timeout: float) -> list[Server]:
    """Connects to a complete set of servers and returns them by shard.

    Raises ConfigError for addresses that are no addresses, and ConnectError when one does not answer
    or the servers found do not make up all shards of one set.
    """
    parsed = parse_addresses(addresses)
    deadline = time.monotonic() + timeout
    servers: list[Server] = []
    try:
        servers += (Server(address, credentials) for address in parsed)
        statuses = []
        for server in servers:
            server.wait_ready(max(deadline - time.monotonic(), 0.1))
            statuses.append(server.describe(max(deadline - time.monotonic(), 1.0)))
        found = ", ".join(
            f"{server.address} is shard {s.shard}/{s.num_shards}" for server, s in zip(servers, statuses, strict=True)
        )
        if any(status.num_shards != len(servers) for status in statuses):
            raise ConnectError(
                f"{len(servers)} server address(es) were given, but {found}; name every server of one set"
            )
        by_shard = {status.shard: server for status, server in zip(statuses, servers, strict=True)}
        if len(by_shard) != len(servers):
            raise ConnectError(f"two servers hold the same shard: {found}; name every server of one set once")
        return [by_shard[shard] for shard in range(len(servers))]
    except Exception:
        for server in servers:
            server.close()
        raise


def parse_addresses(addresses: str | Sequence[str]) -> list[str]:
    """ "host:port,host:port" or a sequence of them as a list; ConfigError names what is not an address."""
    if not isinstance(addresses, (str, list, tuple)) or not all(isinstance(part, str) for part in addresses):
        raise ConfigError(
            f"servers={addresses!r} are no addresses; write 'host:port,host:port' or a list of 'host:port'"
        )
    parts = addresses.split(",") if isinstance(addresses, str) else list(addresses)
    parts = [part.strip() for part in parts]
    if not parts:
        raise ConfigError("no server address was given; write host:port, as in 127.0.0.1:7070")
    for part in parts:
        host, colon, port = part.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        if ":" in host and not bracketed and "/" not in host:
            raise ConfigError(f"{part!r} is not a server address; write IPv6 addresses in brackets: [{host}]:{port}")
        if not host or not colon or "/" in host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ConfigError(f"{part!r} is not a server address; write host:port, as in 127.0.0.1:7070")
    if len(set(parts)) != len(parts):
        raise ConfigError(f"a server address is named twice: {', '.join(parts)}")
    return parts


def new_id() -> str:
    """An id for a commit or a restore, which no other one has."""
    return uuid.uuid4().hex
