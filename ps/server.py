"""A server process from start to end: listen, say so, serve, leave."""

import json
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from protos import KEEPALIVE, MAX_MESSAGE_BYTES, zero_ps_pb2
from ps.address import split_address
from ps.errors import StartError
from ps.guard import Gate, Guard
from ps.jobs import Jobs
from ps.links import Links
from ps.links.nccl import check_device
from ps.optimizer import warm_up
from ps.options import ServerOptions
from ps.process import keep_freed_blocks, return_freed_blocks, share_heaps
from ps.registration import add_service
from ps.security import PLAIN_LINKS_REASON, Security, SecurityOptions
from ps.service import ParameterServer
from ps.store import DataDir
from ps.tier import Tier, policy_named

_SPARE_CONNECTIONS = 128
"""Besides two for each session: of those that are just being replaced, of status and health."""

_CONNECTION_STREAMS = 64
"""Calls and streams of one connection; a trainer has its own, with less than ten. More of them wait in the client."""

_HANDSHAKE_MS = 20_000
"""Who connects and says nothing is sent away after this."""

_RETURNED_BYTES = 256 << 10
_HEAPS = 4
"""Where memory is limited: what malloc gives back at once, and among how many heaps it spreads the threads."""

_GRACE_SECONDS = 5.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServeOptions:
    """What `zero-ps serve` was told. memory_bytes: None for no limit. threads: None for half the cores."""

    server: ServerOptions
    data_dirs: tuple[Path, ...]
    listen: str
    memory_bytes: int | None = None
    threads: int | None = None
    stop_on_stdin_eof: bool = False
    security: SecurityOptions = field(default_factory=SecurityOptions)


class Server:
    """The gRPC server of one shard.

    security: what `options.security` comes to; None to find out here. Raises StartError.
    """

    def __init__(self, options: ServeOptions, data_dir: DataDir, security: Security | None = None) -> None:
        security = security or Security(options.security, options.listen, options.server.links)
        torch.set_num_threads(options.threads or max(1, len(os.sched_getaffinity(0)) // 2))
        if options.memory_bytes is not None:
            return_freed_blocks(_RETURNED_BYTES)
            share_heaps(_HEAPS)
        else:
            keep_freed_blocks()
        self._jobs = Jobs(options.server, data_dir, Tier(options.memory_bytes, policy_named(options.server.eviction)))
        self._links = Links(
            options.server.links,
            options.server.advertise,
            dict.fromkeys(security.kept_in_tls, PLAIN_LINKS_REASON),
            options.server.device,
        )
        self._security = security
        self._service = ParameterServer(self._jobs, self._links, security.access)
        self._health = health.HealthServicer()
        self._grpc = grpc.server(
            # A stream or a wait occupies a thread. They are started on demand.
            ThreadPoolExecutor(self._jobs.places.threads, thread_name_prefix="grpc"),
            maximum_concurrent_rpcs=self._jobs.places.threads,
            interceptors=[] if security.access is None else [Gate(security.access, self._health.Check)],
            options=[
                # Without this a second server on the same port would silently share it.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_concurrent_streams", _CONNECTION_STREAMS),
                ("grpc.max_allowed_incoming_connections", _SPARE_CONNECTIONS + 2 * options.server.max_sessions),
                # Whoever connects and asks for nothing makes room.
                ("grpc.max_connection_idle_ms", 300_000),
                ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
                *KEEPALIVE,
                # Trainers' pings are no abuse.
                ("grpc.http2.min_ping_interval_without_data_ms", 1000),
            ],
        )
        guard = None if security.access is None else Guard(security.access, self._jobs.peek)
        add_service(self._service, self._grpc, guard)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        name = zero_ps_pb2.DESCRIPTOR.services_by_name["ParameterServer"].full_name
        reflection.enable_server_reflection((name, health.SERVICE_NAME, reflection.SERVICE_NAME), self._grpc)
        for service in ("", name):
            self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        self.address = self._listen(options.listen)

    def _listen(self, address: str) -> str:
        host, port = split_address(address)
        try:
            bound = self._security.add_port(self._grpc, f"{host}:{port}")
        except RuntimeError:
            bound = 0
        if bound == 0:
            raise StartError(f"cannot listen on {address}: {_why_not(host, port)}; choose another --listen")
        return f"{host}:{bound}"

    def start(self) -> None:
        self._grpc.start()

    def stop(self, grace_seconds: float) -> None:
        """Commits what is at a step boundary, takes no new calls, lets those that are running finish for a while."""
        self._health.enter_graceful_shutdown()
        self._jobs.leave(grace_seconds)
        stopped = self._grpc.stop(grace_seconds)
        end = time.monotonic() + grace_seconds
        # Streams live as long as their trainers; what counts is whether a request is being answered.
        while time.monotonic() < end and self._service.traffic.active and not stopped.is_set():
            time.sleep(0.02)
        self._grpc.stop(0).wait(1.0)
        self._jobs.close()
        self._links.close()


def serve(options: ServeOptions) -> None:
    """Runs a server until SIGTERM, SIGINT or, if asked for, the end of stdin. Does not return.

    Raises StartError or a StoreError if it cannot start. On readiness one line of JSON goes to stdout.
    """
    # Whatever is written from here on is the owner's alone, also in a folder that others may open.
    os.umask(0o077)
    security = Security(options.security, options.listen, options.server.links)
    if options.server.device is not None:
        check_device(options.server.device)
    data_dir = DataDir(options.data_dirs, options.server.index, options.server.num_shards)
    for path in data_dir.paths:
        if path.stat().st_mode & 0o077:
            _log.warning("%s can be opened by others than its owner, and what is in there cannot: chmod 700 it", path)
    server = Server(options, data_dir, security)
    stopping = threading.Event()

    # Only of signals: that the parent closes stdin besides says nothing new.
    received: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)
        stopping.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGHUP, lambda number, frame: security.reload())
    if options.stop_on_stdin_eof:
        threading.Thread(target=_watch_parent, args=(stopping,), name="parent", daemon=True).start()
    server.start()
    shard, num_shards = options.server.index, options.server.num_shards
    ready = {"listening": server.address, "shard": shard, "num_shards": num_shards, "pid": os.getpid()}
    print(json.dumps(ready), flush=True)
    places = ", ".join(map(str, data_dir.paths))
    _log.info(
        "shard %d/%d listens on %s (%s), data in %s", shard, num_shards, server.address, security.describe(), places
    )
    threading.Thread(target=warm_up, name="warm-up", daemon=True).start()
    stopping.wait()
    _log.info("shard %d/%d stops", shard, num_shards)
    server.stop(_GRACE_SECONDS)
    data_dir.close()
    _leave()


def _leave() -> None:
    """Ends the process. Threads that wait for a trainer which went away must not hold it up."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)


def _watch_parent(stopping: threading.Event) -> None:
    """Sets `stopping` when stdin ends or the parent is gone, even if a fork of it still holds the pipe."""
    parent = os.getppid()
    while os.getppid() == parent:
        readable, _, _ = select.select([0], [], [], 1.0)
        if readable and not os.read(0, 4096):
            break
    stopping.set()


def _why_not(host: str, port: int) -> str:
    """What the operating system says to binding this address."""
    name = host.strip("[]")
    try:
        # `create_server` would raise these errors as OSErrors whose numbers mean nothing.
        socket.getaddrinfo(name, port)
        with socket.create_server((name, port), family=_family(host), reuse_port=False):
            return "gRPC refuses the address"
    except socket.gaierror as error:
        return f"the name {name!r} does not resolve ({error.strerror})"
    except OSError as error:
        return os.strerror(error.errno) if error.errno else str(error)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if host.startswith("[") else socket.AF_INET
