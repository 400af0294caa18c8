"""A pair over NCCL: from device to device, past both hosts' processors where the network can.

NCCL has no tags: what is sent meets what is received in the order of the calls. So each direction has a communicator
of its own, and a stream. A stream that sends or receives does so as soon as the other end does, and until then it
occupies a little of the device.
"""

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence

import torch

from protos import nccl, pair
from protos.cuda_stream import CudaStream, Mark, Stage
from protos.nccl import ID_BYTES, Communicator
from protos.pair import DEPTH, MOVE_SECONDS, PARCEL_BYTES, SERVER, Exchange, Pair, Work

_FORM_SECONDS = 30.0
"""How long the two ends may take to make their communicators: NCCL looks at the machine and loads its kernels first."""

_FREE_SECONDS = 1.0
"""How long an end that is given up waits for its communicators to be freed, which takes milliseconds where the device
does nothing else."""

_POLL_SECONDS = 0.00005
_LONGEST_POLL_SECONDS = 0.0005

_log = logging.getLogger(__name__)

_lost: list[object] = []
"""Memory of streams that did not come to an end. It is never used again."""


class _Lane:
    """One direction. patience: seconds that the other end may take until there is room for another parcel."""

    def __init__(self, communicator: Communicator, stream: CudaStream, device: torch.device) -> None:
        self.communicator = communicator
        self.stream = stream
        self.device = device
        self.patience = _FORM_SECONDS
        self.stages = [stream.stage(PARCEL_BYTES) for _ in range(DEPTH)]

    def until(self, ready: Callable[[], object], seconds: float) -> None:
        """Raises RuntimeError when it takes longer, and for an end of the pair, which may be what it is ready by."""
        end = time.monotonic() + seconds
        pause = _POLL_SECONDS
        while not ready():
            self.communicator.settled()
            if time.monotonic() > end:
                raise RuntimeError(f"the other end did not move a parcel within {seconds:g} s")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_POLL_SECONDS)
        self.communicator.settled()

    def wait_end(self, mark: Mark) -> None:
        """Returns when the stream touches no memory any more; its communicator is being aborted. mark: its end."""
        end = time.monotonic() + pair.MOVE_SECONDS
        try:
            while not mark.reached():
                if time.monotonic() > end:
                    raise RuntimeError(f"it is still busy after {pair.MOVE_SECONDS:g} s")
                time.sleep(_LONGEST_POLL_SECONDS)
        except RuntimeError as error:
            self.lose(error)

    def lose(self, error: RuntimeError) -> None:
        _lost.append(self)
        _log.error("the stream of a link that has ended did not come to an end: %s", error)


class _Sent:
    def __init__(self, lane: _Lane, mark: Mark, memory: torch.Tensor) -> None:
        self._lane = lane
        self._mark = mark
        self._memory = memory

    def wait(self, seconds: float = MOVE_SECONDS) -> None:
        self._lane.until(self._mark.reached, seconds)


class _Outgoing(_Lane):
    def __init__(self, communicator: Communicator, stream: CudaStream, device: torch.device) -> None:
        super().__init__(communicator, stream, device)
        # Longest in use first, each with the point at which it is free again.
        self._used: deque[tuple[Mark | None, Stage]] = deque((None, stage) for stage in self.stages)

    def send(self, data: torch.Tensor) -> _Sent:
        if data.device == self.device:
            return _Sent(self, self._send(data), data)
        mark, stage = self._used[0]
        if mark is not None:
            self.until(mark.reached, self.patience)
        size = data.numel()
        stage.host[:size].copy_(data)
        self.stream.copy(stage.device[:size], stage.host[:size])
        mark = self._send(stage.device[:size])
        self._used.popleft()
        self._used.append((mark, stage))
        return _Sent(self, mark, data)

    def _send(self, data: torch.Tensor) -> Mark:
        self.communicator.send(data.data_ptr(), data.numel(), self.stream.handle, self.patience)
        return self.stream.mark()


class _Incoming(_Lane):
    def __init__(self, communicator: Communicator, stream: CudaStream, device: torch.device) -> None:
        super().__init__(communicator, stream, device)
        self.free = deque(self.stages)

    def receive(self, target: torch.Tensor) -> "_Received":
        if target.device == self.device:
            return _Received(self, self._receive(target), target, None)
        # Given back by who waits for what came before.
        self.until(lambda: self.free, self.patience)
        stage = self.free.popleft()
        size = target.numel()
        self._receive(stage.device[:size])
        self.stream.copy(stage.host[:size], stage.device[:size])
        return _Received(self, self.stream.mark(), target, stage)

    def _receive(self, target: torch.Tensor) -> Mark:
        self.communicator.receive(target.data_ptr(), target.numel(), self.stream.handle, self.patience)
        return self.stream.mark()


class _Received:
    def __init__(self, lane: _Incoming, mark: Mark, target: torch.Tensor, stage: Stage | None) -> None:
        self._lane = lane
        self._mark = mark
        self._target = target
        self._stage = stage

    def wait(self, seconds: float = MOVE_SECONDS) -> None:
        self._lane.until(self._mark.reached, seconds)
        stage, self._stage = self._stage, None
        if stage is not None:
            self._target.copy_(stage.host[: self._target.numel()])
            self._lane.free.append(stage)


class NcclPair(Pair):
    """Making it returns when the other end has been made, too. Memory of the device is moved where it is, and the
    host's by way of a few stages of `PARCEL_BYTES`.

    What is moved where it is has to be free for that: this pair's streams wait for no others.
    """

    def __init__(self, rank: int, device: torch.device, secret: str, exchange: Exchange) -> None:
        """exchange: the trainer's end says how the two find each other, and the server's which NCCL it has.

        Raises RuntimeError or OSError where the two do not find each other, or somebody else came.
        """
        super().__init__()
        self.device = device
        self._lanes: list[_Lane] = []
        self._communicators: list[Communicator] = []
        ids = _exchanged(rank, exchange)
        self._left, self._freed = threading.Event(), threading.Event()
        # Freeing may have to wait for the rest of the device, as for another pair's streams. The thread is there from
        # the beginning: none can be started when the interpreter ends.
        freeing = (self._communicators, self._left, self._freed)
        threading.Thread(target=_free, args=freeing, name="nccl", daemon=True).start()
        weakref.finalize(self, self._left.set).atexit = False
        end = time.monotonic() + _FORM_SECONDS
        try:
            for number, unique_id in enumerate(ids):
                # In the first one the server sends, in the second one the trainer; who sends has rank 0.
                place = rank if number == 0 else 1 - rank
                self._communicators.append(Communicator(device, unique_id, place, end - time.monotonic()))
            sends, receives = self._communicators if rank == SERVER else reversed(self._communicators)
            self._outgoing = _Outgoing(sends, CudaStream(device), device)
            self._lanes.append(self._outgoing)
            self._incoming = _Incoming(receives, CudaStream(device), device)
            self._lanes.append(self._incoming)
            self._meet(rank, secret)
        except BaseException:
            self.abort()
            raise
        self._incoming.patience = pair.MOVE_SECONDS
        self._outgoing.patience = pair.MOVE_SECONDS if rank == SERVER else pair.ROOM_SECONDS

    def send(self, data: torch.Tensor, tag: int) -> Work:
        return self._outgoing.send(data)

    def _receive(self, target: torch.Tensor, tag: int) -> Work:
        return self._incoming.receive(target)

    def abort(self) -> None:
        # While nothing is freed yet: that may keep the device from all else.
        ends: list[tuple[_Lane, Mark]] = []
        for lane in self._lanes:
            try:
                ends.append((lane, lane.stream.mark()))
            except RuntimeError as error:
                lane.lose(error)
        self._left.set()
        for lane, mark in ends:
            lane.wait_end(mark)
        self._freed.wait(_FREE_SECONDS)

    def leave(self) -> None:
        self._left.set()


def _free(communicators: Sequence[Communicator], left: threading.Event, freed: threading.Event) -> None:
    left.wait()
    try:
        if communicators:
            Communicator.abort(*communicators)
    except RuntimeError as error:
        _log.error("communicators could not be ended: %s", error)
    finally:
        freed.set()


def _exchanged(rank: int, exchange: Exchange) -> tuple[bytes, bytes]:
    """The ids of the two communicators, which the trainer makes. Raises RuntimeError."""
    library = nccl.library()
    version = str(library.version).encode()
    mine = version if rank == SERVER else library.unique_id() + library.unique_id()
    answers: list[bytes] = []
    exchange(mine, answers.append)
    (theirs,) = answers
    if rank != SERVER and theirs != version:
        raise RuntimeError(
            f"the server has NCCL {theirs.decode(errors='replace')[:20]} and this trainer {library.version}; install "
            "the same torch on both"
        )
    ids = theirs if rank == SERVER else mine
    if len(ids) != 2 * ID_BYTES:
        raise RuntimeError(f"an nccl pair takes two ids of {ID_BYTES} bytes")
    return ids[:ID_BYTES], ids[ID_BYTES:]
