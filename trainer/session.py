"""A trainer's lease on a job: one session with every server, kept alive by heartbeats."""

import contextlib
import functools
import threading
import time
from collections.abc import Sequence
from typing import Any

import grpc

from protos import PROTOCOL_VERSION
from protos import zero_ps_pb2 as pb
from trainer.errors import (
    DeadlineExceeded,
    RequestRefused,
    ServerLost,
    SessionLost,
    TokenUnknown,
    TrainerLost,
    ZeroPsError,
)
from trainer.membership import Place, Wish
from trainer.server import Server, call_all, finish_all

_UNKNOWN_LEASE_SECONDS = 3.0

_FAREWELL_SECONDS = 1.0
"""How long a trainer that will come again waits for servers to hear of it. One that does not answer is gone, or finds
out when the lease ends."""


class Session:
    """Renews its lease with each server from a thread, until `close` or `stop`. Opened by `open`.

    place: among the trainers of the job. lease_seconds: if shard 0 gave one with the place.
    states: what the servers answered, by shard.
    error: why a server no longer accepts this session (its lease ended, a newer process took the rank, another
        trainer was lost), or None.
    """

    def __init__(self, servers: Sequence[Server], wish: Wish, place: Place, lease_seconds: float | None = None) -> None:
        self.error: ZeroPsError | None = None
        self.states: list[pb.OpenSessionResponse] = []
        self._servers = servers
        self._wish = wish
        self._place = place
        self._closed = threading.Event()
        # When a server last took a heartbeat, on the monotonic clock.
        self._heard: dict[Server, float] = {}
        # Until a server has said how long a lease is.
        self._lease = lease_seconds or _UNKNOWN_LEASE_SECONDS
        # One server may answer at once and another only when updates are done. The lease on the first has to last
        # until then, and those who wait for this trainer there have to hear that it lives.
        self._thread = threading.Thread(target=self._renew, name="zero-ps heartbeat", daemon=True)
        self._thread.start()

    def open(self, offers: Sequence[Sequence[pb.LinkOffer]], timeout: float) -> None:
        """Opens the sessions. offers: of links, to each server. timeout: seconds for a server to be ready."""
        servers, wish, place = self._servers, self._wish, self._place
        calls = []
        for shard, server in enumerate(servers):
            request = pb.OpenSessionRequest(
                protocol_version=PROTOCOL_VERSION,
                job=wish.job,
                rank=place.rank,
                world_size=place.world_size,
                incarnation=wish.incarnation,
                read_only=wish.read_only,
                shard=shard,
                num_shards=len(servers),
                timeout_seconds=timeout,
                links=offers[shard],
                group=place.group,
            )
            # The server waits up to `timeout` for a former group to end and says so itself.
            calls.append(server.start("OpenSession", request, timeout + 5))
            calls[-1].add_done_callback(functools.partial(self._opened, server))
        self.states = finish_all(servers, calls)
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
                try:
                    beats[server] = server.start("Heartbeat", request, interval)
                except ValueError:
                    # The channel was closed meanwhile.
                    return
                beats[server].add_done_callback(functools.partial(self._answered, server))

    def _answered(self, server: Server, beat: "grpc.Future[Any]") -> None:
        try:
            server.finish(beat)
            self._heard[server] = time.monotonic()
        except TokenUnknown as error:
            # It may be back before the lease is over. After that nobody would be told that it is.
            if time.monotonic() - self._heard.setdefault(server, time.monotonic()) > self._lease:
                self._lost(server, error)
        except (RequestRefused, SessionLost, TrainerLost) as error:
            # The server does not know the session any more. That it did not answer, or not in time, may
            # pass; whoever waits for it finds out otherwise.
            self._lost(server, error)
        except ServerLost as error:
            if server.on_lost is not None and not self._closed.is_set():
                server.on_lost(error)
        except Exception:
            pass

    def _lost(self, server: Server, error: ZeroPsError) -> None:
        if not self._closed.is_set():
            self.error = self.error or error
            self._pass_on(server, error)

    def _pass_on(self, knows: Server, error: ZeroPsError) -> None:
        """Where one server has ended this session, its group is to end with all: this trainer, and others, may be
        waiting there for what will not come."""
        others = [server for server in self._servers if server is not knows]
        self._end_group(others, str(error), passed_on=isinstance(error, TrainerLost))

    def _end_group(
        self, servers: Sequence[Server], reason: str, *, passed_on: bool = False
    ) -> "list[grpc.Future[Any]]":
        calls: list[grpc.Future[Any]] = []
        for server in servers if self._place.group else ():
            if server.session_id:
                request = pb.EndGroupRequest(session_id=server.session_id, reason=reason[:1000], passed_on=passed_on)
                with contextlib.suppress(ValueError):  # the channel was closed meanwhile
                    calls.append(server.start("EndGroup", request, 2 * _FAREWELL_SECONDS))
        return calls

    def check(self) -> None:
        """Raises what a heartbeat found out."""
        if self.error is not None:
            raise self.error

    def find_lost(self) -> ZeroPsError | None:
        """The error that names a trainer of the group which is lost or has left; None if all live, or too much time
        goes by.

        Waits until the lease of one that died without a word is over.
        """
        seconds = self._lease + _FAREWELL_SECONDS
        server = self._servers[0]
        # Those who wait for one that is missing are told, and those who all come know that nobody is.
        request = pb.BarrierRequest(
            session_id=server.session_id, tag=f"{self._place.group}.who is lost", timeout_seconds=seconds
        )
        try:
            server.call("Barrier", request, seconds + 5)
        except DeadlineExceeded:
            return None
        except ZeroPsError as error:
            return error
        return None

    def close(self, step: int = 0) -> None:
        """Gives the lease back. A server that cannot be told finds out when the lease ends.

        step: every server has been asked for the steps before it; the last of them will be made with what this trainer
            contributed.
        """
        if self._closed.is_set():
            return
        self.stop()
        with contextlib.suppress(ZeroPsError):
            call_all(
                [server for server in self._servers if server.session_id],
                "CloseSession",
                lambda server: pb.CloseSessionRequest(session_id=server.session_id, step=step),
                5.0,
            )

    def give_up(self, reason: str) -> None:
        """Tells the servers, and by them the other trainers, that this one will join anew."""
        if self._closed.is_set():
            return
        self.stop()
        end = time.monotonic() + _FAREWELL_SECONDS
        for call in self._end_group(self._servers, reason):
            with contextlib.suppress(grpc.RpcError, grpc.FutureTimeoutError, grpc.FutureCancelledError):
                call.result(max(0.0, end - time.monotonic()))

    def stop(self) -> None:
        """Ends the heartbeats."""
        self._closed.set()
        self._thread.join()
