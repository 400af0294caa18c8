"""The link between hosts: a gloo process group of this trainer and one server."""

import queue
import secrets
import threading
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from protos import pair
from protos import zero_ps_pb2 as pb
from protos.frames import Data
from protos.pair import Pair
from trainer.errors import ZeroPsError
from trainer.links.base import Candidate, LinkUnusable, Push
from trainer.links.streams import PendingPull, StreamLink
from trainer.rpc import gone
from trainer.server import Server


class GlooLink(StreamLink):
    """Bytes land where they are wanted; a thread waits for them."""

    kind = "gloo"

    def __init__(self, server: Server, pair: Pair) -> None:
        self._pair = pair
        self._tag = 0
        # By the push: what may not be changed or freed before the server has it.
        self._leaving: dict[int, list[tuple[dist.Work, torch.Tensor]]] = {}
        # What is on its way of the pull that is being answered, and the pulls of which all is.
        self._works: list[dist.Work] = []
        self._coming: queue.SimpleQueue[tuple[PendingPull, list[dist.Work]] | None] = queue.SimpleQueue()
        self._waiter = threading.Thread(target=self._wait, name=f"zero-ps gloo {server.address}", daemon=True)
        self._waiter.start()
        super().__init__(server)

    def close(self) -> None:
        # What gloo is about to receive has an address in memory that will be another's soon.
        self._pair.abort()
        super().close()
        self._coming.put(None)
        self._waiter.join()

    # ------------------------------------------------------------ pulls

    def deliver(self, response: Data | pb.PullResponse, pull: PendingPull) -> None:
        super().deliver(response, pull)
        for parcel in () if isinstance(response, Data) else response.parcels:
            target = pull.claim(parcel.size)
            try:
                self._works.append(self._pair.receive(target, parcel.tag))
            except RuntimeError as error:
                raise self._gone(error) from error

    def complete(self, pull: PendingPull) -> None:
        works, self._works = self._works, []
        self._coming.put((pull, works))

    def _wait(self) -> None:
        while (coming := self._coming.get()) is not None:
            pull, works = coming
            try:
                for work in works:
                    pair.wait(work)
            except Exception as error:
                pull.fail(self._gone(error))
            else:
                pull.finish()
            # A local of an idle thread would keep what was pulled last.
            del coming, pull, works

    def _gone(self, error: Exception) -> ZeroPsError:
        return gone(f"server {self.address}: the gloo link is broken: {error}")

    # ------------------------------------------------------------ pushes

    def _pack(self, push: Push, header: pb.PushHeader) -> Iterator[bytes]:
        if sum(source.numel() for source in push.sources) < pair.SMALL_BYTES:
            return super()._pack(push, header)
        leaving = []
        for source in push.sources:
            for data in torch.split(source, pair.PARCEL_BYTES) if source.numel() else ():
                self._tag = (self._tag + 1) % (1 << 31)
                try:
                    leaving.append((self._pair.send(data, self._tag), data))
                except RuntimeError as error:
                    raise self._gone(error) from error
                header.parcels.add(tag=self._tag, size=data.numel())
        self._leaving[header.request_id] = leaving
        return iter(())

    def acknowledged(self, request_id: int) -> None:
        self._leaving.pop(request_id, None)


class GlooCandidate(Candidate):
    kind = "gloo"

    def __init__(self, server: Server) -> None:
        """Makes the pair, with the server."""
        if why := pair.usable():
            raise LinkUnusable(why)
        self._token = secrets.token_hex(16)
        host, _, port = server.address.rpartition(":")
        host = host.strip("[]")

        def exchange(mine: bytes, receive: Callable[[bytes], None]) -> None:
            request = pb.PrepareLinkRequest(kind=self.kind, token=self._token, host=host, address=mine)
            receive(server.call("PrepareLink", request, pair.FORM_SECONDS).address)

        try:
            self._pair = Pair(pair.TRAINER, pair.local_address(host, int(port)), self._token, exchange)
        except (OSError, RuntimeError) as error:
            raise LinkUnusable(f"a process group with the server cannot be made: {error}") from error

    def offer(self) -> pb.LinkOffer:
        return pb.LinkOffer(kind=self.kind, token=self._token)

    def open(self, server: Server) -> GlooLink:
        return GlooLink(server, self._pair)
