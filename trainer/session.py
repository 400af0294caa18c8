"""A trainer's lease on a job: one session with every server, kept alive by heartbeats."""

import contextlib
import functools
import threading
import uuid
from collections.abc import Sequence
from typing import Any

import grpc

from protos import PROTOCOL_VERSION
from protos import zero_ps_pb2 as pb
from trainer.errors import RequestRefused, ZeroPsError
from trainer.server import Server, call_all, finish_all

_UNKNOWN_LEASE_SECONDS = 3.0


class Session:
    """Opens a session with each server and renews it from a thread until `close`.

    offers: of links, to each server.
    error: why a server no longer accepts this session (its lease ended, a newer process took the
        rank), or None.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        offers: Sequence[Sequence[pb.LinkOffer]],
        *,
        job: str,
        rank: int,
        world_size: int,
        read_only: bool,
        timeout: float,
    ) -> None:
        self.error: ZeroPsError | None = None
        self._servers = servers
        self._closed = threading.Event()
        # Until a server has said how long a lease is.
        self._lease = _UNKNOWN_LEASE_SECONDS
        # One server may answer at once and another only when a former group has ended. The lease on the
        # first has to last until then, and those who wait for this trainer there have to hear that it lives.
        self._thread = threading.Thread(target=self._renew, name="zero-ps heartbeat", daemon=True)
        self._thread.start()
        incarnation = uuid.uuid4().hex
        calls = []
        for shard, server in enumerate(servers):
            request = pb.OpenSessionRequest(
                protocol_version=PROTOCOL_VERSION,
                job=job,
                rank=rank,
                world_size=world_size,
                incarnation=incarnation,
                read_only=read_only,
                shard=shard,
                num_shards=len(servers),
                timeout_seconds=timeout,
                links=offers[shard],
            )
            # The server waits up to `timeout` for a former group to end and says so itself.
            calls.append(server.start("OpenSession", request, timeout + 5))
            calls[-1].add_done_callback(functools.partial(self._opened, server))
        try:
            self.states: list[pb.OpenSessionResponse] = finish_all(servers, calls)
        except BaseException:
            # Nobody is to wait for the end of leases that this trainer has no use for.
            self.close()
            raise
        for server, state in zip(servers, self.states, strict=True):
            server.session_id = state.session_id
        self._lease = min(state.lease_seconds for state in self.states)

    def _opened(self, server: Server, call: "grpc.Future[Any]") -> None:
        if not call.cancelled() and call.exception() is None:
            server.session_id = call.result().session_id

    def _renew(self) -> None:
        """Sends each server its heartbeats, whatever the others do: one that is slow must not cost the
        lease on those that are not."""
        beats: dict[Server, grpc.Future[Any]] = {}
        while not self._closed.wait(interval := self._lease / 3):
            for server in self._servers:
                if not server.session_id or (server in beats and not beats[server].done()):
                    continue
                request = pb.HeartbeatRequest(session_id=server.session_id)
                beats[server] = server.start("Heartbeat", request, interval)
                beats[server].add_done_callback(functools.partial(self._answered, server))

    def _answered(self, server: Server, beat: "grpc.Future[Any]") -> None:
        try:
            server.finish(beat)
        except RequestRefused as error:
            # The server does not know the session any more. That it did not answer, or not in time, may
            # pass; whoever waits for it finds out otherwise.
            if not self._closed.is_set():
                self.error = error
        except Exception:
            pass

    def check(self) -> None:
        """Raises what a heartbeat found out."""
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """Gives the lease back. A server that cannot be told finds out when the lease ends."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join()
        with contextlib.suppress(ZeroPsError):
            call_all(
                self._servers,
                "CloseSession",
                lambda server: pb.CloseSessionRequest(session_id=server.session_id),
                5.0,
            )
