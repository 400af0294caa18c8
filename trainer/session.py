"""A trainer's lease on a job: one session with every server, kept alive by heartbeats."""

import contextlib
import threading
import uuid
from collections.abc import Sequence

from protos import PROTOCOL_VERSION
from protos import zero_ps_pb2 as pb
from trainer.errors import ZeroPsError
from trainer.server import Server, call_all


class Session:
    """Opens a session with each server and renews it from a thread until `close`.

    error: why a server no longer accepts this session (its lease ended, a newer process took the
        rank), or None.
    """

    def __init__(
        self,
        servers: Sequence[Server],
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
        incarnation = uuid.uuid4().hex
        self.states: list[pb.OpenSessionResponse] = call_all(
            servers,
            "OpenSession",
            lambda server: pb.OpenSessionRequest(
                protocol_version=PROTOCOL_VERSION,
                job=job,
                rank=rank,
                world_size=world_size,
                incarnation=incarnation,
                read_only=read_only,
                shard=servers.index(server),
                num_shards=len(servers),
                timeout_seconds=timeout,
            ),
            # The server waits up to `timeout` for a former group to end and says so itself.
            timeout + 5,
        )
        for server, state in zip(servers, self.states, strict=True):
            server.session_id = state.session_id
        self._lease = min(state.lease_seconds for state in self.states)
        self._thread = threading.Thread(target=self._renew, name="zero-ps heartbeat", daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        while not self._closed.wait(self._lease / 3):
            try:
                call_all(
                    self._servers,
                    "Heartbeat",
                    lambda server: pb.HeartbeatRequest(session_id=server.session_id),
                    self._lease,
                )
            except ZeroPsError as error:
                if not self._closed.is_set():
                    self.error = error

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
