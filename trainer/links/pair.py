"""The links between hosts: a pair of this trainer and one server moves what is large, and messages the rest."""

import queue
import secrets
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch

from protos import pair
from protos import zero_ps_pb2 as pb
from protos.frames import Data
from protos.pair import Exchange, Pair, Work
from trainer.errors import ZeroPsError
from trainer.links.base import Candidate, LinkUnusable, Push
from trainer.links.streams import PendingPull, StreamLink
from trainer.rpc import gone
from trainer.server import Server


class PairLink(StreamLink):
    """Bytes land where they are wanted; a thread waits for them."""

    def __init__(self, kind: str, server: Server, pair: Pair) -> None:
        self.kind = kind
        self.device = pair.device
        self._pair = pair
        self._tag = 0
        # By the push: what may not be changed or freed before the server has it.
        self._leaving: dict[int, list[Work]] = {}
        # Parcels on their way, and behind those of a pull how it ends: None, or its error.
        self._coming: queue.SimpleQueue[tuple[PendingPull, Work | Exception | None] | None] = queue.SimpleQueue()
        # Of the pull that is being answered.
        self._works: list[Work] = []
        self._waiter = threading.Thread(target=self._wait, name=f"zero-ps {kind} {server.address}", daemon=True)
        self._waiter.start()
        super().__init__(server)

    def close(self) -> None:
        super().close()
        self._coming.put(None)
        self._waiter.join()

    def abandon(self) -> None:
        # What is about to be received has an address in memory that will be another's soon.
        self._pair.abort()

    # ------------------------------------------------------------ pulls

    def deliver(self, response: Data | pb.PullResponse, pull: PendingPull) -> None:
        super().deliver(response, pull)
        for parcel in () if isinstance(response, Data) else response.parcels:
            target = pull.claim(parcel.size)
            try:
                work = self._pair.receive(target, parcel.tag)
            except RuntimeError as error:
                raise self._gone(error) from error
            self._works.append(work)
            if self.device is not None:
                # Where the next one goes may be free only when somebody has waited for this one.
                self._hand_over(pull)

    def complete(self, pull: PendingPull) -> None:
        self._hand_over(pull)
        self._coming.put((pull, None))

    def refused(self, pull: PendingPull, error: Exception) -> None:
        self._hand_over(pull)
        self._coming.put((pull, error))

    def _hand_over(self, pull: PendingPull) -> None:
        """To the thread that waits. All of a pull at once where that can be: each time it has to get Python's lock."""
        works, self._works = self._works, []
        for work in works:
            self._coming.put((pull, work))

    def _wait(self) -> None:
        while (coming := self._coming.get()) is not None:
            pull, what = coming
            if what is None:
                pull.finish()
            elif isinstance(what, Exception):
                pull.fail(what)
            else:
                try:
                    what.wait()
                except Exception as error:
                    self.fail(self._gone(error))
                    pull.fail(self._gone(error))
            # A local of an idle thread would keep what was pulled last.
            del coming, pull, what

    def _gone(self, error: Exception) -> ZeroPsError:
        return gone(f"server {self.address}: the {self.kind} link is broken: {error}")

    # ------------------------------------------------------------ pushes

    def _pack(self, push: Push, header: pb.PushHeader) -> Iterator[bytes]:
        size = sum(source.numel() for source in push.sources)
        if size < pair.SMALL_BYTES and all(source.device.type == "cpu" for source in push.sources):
            return super()._pack(push, header)
        parcels = []
        for source in push.sources:
            for data in torch.split(source, pair.PARCEL_BYTES) if source.numel() else ():
                self._tag = pair.next_tag(self._tag)
                header.parcels.add(tag=self._tag, size=data.numel())
                parcels.append((self._tag, data))
        works = self._leaving[header.request_id] = []
        return self._send(parcels, works)

    def _send(self, parcels: Sequence[tuple[int, torch.Tensor]], works: list[Work]) -> Iterator[bytes]:
        """No messages: sends parcels when their header has left, as the server has to know of them to take them."""
        try:
            for tag, data in parcels:
                works.append(self._pair.send(data, tag))
        except RuntimeError as error:
            self.fail(self._gone(error))
        yield from ()

    def acknowledged(self, request_id: int) -> None:
        self._leaving.pop(request_id, None)


class PairCandidate(Candidate):
    def __init__(self, server: Server) -> None:
        """Makes the pair, with the server."""
        self._token = secrets.token_hex(16)
        host, _, port = server.address.rpartition(":")
        host = host.strip("[]")

        def exchange(mine: bytes, receive: Callable[[bytes], None]) -> None:
            request = pb.PrepareLinkRequest(kind=self.kind, token=self._token, host=host, address=mine)
            receive(server.call("PrepareLink", request, pair.FORM_SECONDS).address)

        try:
            self._pair = self._make(host, int(port), self._token, exchange)
        except (OSError, RuntimeError) as error:
            raise LinkUnusable(f"a {self.kind} pair with the server cannot be made: {error}") from error

    @abstractmethod
    def _make(self, host: str, port: int, secret: str, exchange: Exchange) -> Pair:
        """This trainer's end; host and port are the server's. Raises OSError, RuntimeError, LinkUnusable."""

    def offer(self) -> pb.LinkOffer:
        return pb.LinkOffer(kind=self.kind, token=self._token)

    def open(self, server: Server) -> PairLink:
        return PairLink(self.kind, server, self._pair)

    def close(self) -> None:
        self._pair.leave()
