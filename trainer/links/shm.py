"""The link within one host: bytes are read where the server has them, and lie where the server reads them."""

import contextlib
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace

import torch

from protos import rendezvous
from protos import zero_ps_pb2 as pb
from protos.frames import Data
from protos.segment import Arena, Segment
from trainer.errors import ConnectError
from trainer.links.base import Candidate, LinkUnusable, Push
from trainer.links.channels import SocketChannel
from trainer.links.outbox import SMALL_BYTES, Outbox
from trainer.links.streams import PendingPull, StreamLink
from trainer.server import Server

_HANDSHAKE_SECONDS = 5.0

_MAX_COPY_BYTES = 64 << 20
"""What is to leave and is not in shared memory yet is copied there, if it is no more than this."""


class ShmLink(StreamLink):
    kind = "shm"

    def __init__(
        self,
        server: Server,
        connection: socket.socket,
        streams: Sequence[socket.socket],
        segment: Segment,
        outbox: Outbox,
    ) -> None:
        """streams: for pulls and for pushes."""
        self._connection = connection
        # Both until the link is closed: whoever still holds a link then holds no memory with it.
        self._segment: Segment | None = segment
        self._arena: Arena | None = outbox.arena
        self._regions_read = 0
        self._leaving: dict[Future[None], Sequence[torch.Tensor]] = {}
        super().__init__(server, *(SocketChannel(server.address, stream) for stream in streams))
        # Sockets of one host do not break where the way between the addresses is cut, as by a proxy.
        server.on_lost = self.fail

    def push(self, push: Push) -> "Future[None]":
        sources = self._shared(push.sources)
        future = super().push(replace(push, sources=sources))
        # The server reads them until it has acknowledged them.
        self._leaving[future] = sources
        future.add_done_callback(self._left)
        return future

    def _left(self, future: "Future[None]") -> None:
        del self._leaving[future]

    def close(self) -> None:
        super().close()
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        self._segment = self._arena = None

    def deliver(self, response: Data | pb.PullResponse, pull: PendingPull) -> None:
        super().deliver(response, pull)
        if isinstance(response, Data) or not response.regions:
            return
        if (segment := self._segment) is None:
            raise ConnectError(f"server {self.address}: the link was closed")
        for region in response.regions:
            pull.claim(region.size).copy_(segment.tensor(region.offset, region.size))
        self._regions_read += len(response.regions)
        try:
            # This is also how a trainer finds out that the memory was still its own to read: a server that has
            # given it to others has closed the connection before.
            self._connection.send(rendezvous.encode_count(self._regions_read))
        except OSError as error:
            raise ConnectError(
                f"server {self.address}: the link through shared memory has ended ({error.strerror}); the session's "
                "lease ran out, or the server is gone"
            ) from error

    def _pack(self, push: Push, header: pb.PushHeader) -> Iterator[bytes]:
        arena = self._arena
        offsets = [None if arena is None else arena.offset_of(source) for source in push.sources]
        if not push.sources or None in offsets:
            return super()._pack(push, header)
        header.regions.extend(
            pb.Region(offset=offset, size=source.numel()) for offset, source in zip(offsets, push.sources, strict=True)
        )
        return iter(())

    def _shared(self, sources: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """The sources, where the server can read them if that is worth a copy."""
        arena, size = self._arena, sum(source.numel() for source in sources)
        if arena is None or not SMALL_BYTES <= size <= _MAX_COPY_BYTES:
            return sources
        try:
            return [source if arena.offset_of(source) is not None else _copy(source, arena.take) for source in sources]
        except MemoryError:
            return sources


class ShmCandidate(Candidate):
    kind = "shm"

    def __init__(self, address: str, outbox: Callable[[], Outbox]) -> None:
        """Connects to the server's socket. outbox: the one of this trainer, made if there is none yet."""
        self._token = secrets.token_hex(16)
        try:
            self._outbox = outbox()
        except (OSError, AttributeError) as error:
            raise LinkUnusable(f"the trainer cannot share memory: {error}") from error
        try:
            self._connection = rendezvous.connect(address, _HANDSHAKE_SECONDS)
        except OSError as error:
            raise LinkUnusable(str(error)) from error
        try:
            rendezvous.send_files(self._connection, self._token, self._outbox.arena.fd)
        except OSError as error:
            self.close()
            raise LinkUnusable(f"the server did not take this trainer's memory: {error}") from error

    def offer(self) -> pb.LinkOffer:
        return pb.LinkOffer(kind=self.kind, token=self._token)

    def open(self, server: Server) -> ShmLink:
        try:
            _, (fd, *streams) = rendezvous.receive_files(self._connection, 3)
            pulls, pushes = (socket.socket(fileno=stream) for stream in streams)
            segment = Segment(fd)
            self._connection.settimeout(None)
        except (OSError, ValueError) as error:
            self.close()
            raise ConnectError(
                f"server {server.address} chose shared memory and did not hand it over: {error}"
            ) from None
        return ShmLink(server, self._connection, (pulls, pushes), segment, self._outbox)

    def close(self) -> None:
        self._connection.close()


def _copy(source: torch.Tensor, take: Callable[[int], torch.Tensor]) -> torch.Tensor:
    target = take(source.numel())
    target.copy_(source)
    return target
