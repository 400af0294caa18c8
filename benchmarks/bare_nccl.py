"""Two processes that send and receive on a GPU over NCCL and nothing else: what the `nccl` link is compared with. Run
as a program it is the other end."""

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from protos import nccl
from protos.cuda_stream import CudaStream, Mark
from protos.nccl import ID_BYTES, Communicator
from protos.pair import DEPTH, PARCEL_BYTES

_SECONDS = 60.0


class _End:
    """rank: 0 for the end that sends in the first of the two directions."""

    def __init__(self, rank: int, ids: bytes) -> None:
        device = torch.device("cuda:0")
        self._stream = CudaStream(device)
        first = Communicator(device, ids[:ID_BYTES], rank, _SECONDS)
        second = Communicator(device, ids[ID_BYTES:], 1 - rank, _SECONDS)
        self._out, self._in = (first, second) if rank == 0 else (second, first)
        self._memory = [torch.ones(PARCEL_BYTES, dtype=torch.uint8, device=device) for _ in range(DEPTH)]
        torch.cuda.synchronize()

    def move(self, word: str, nbytes: int) -> None:
        """Sends or receives that many bytes in parcels of the link's size."""
        move = self._out.send if word == "send" else self._in.receive
        under_way: deque[Mark] = deque()
        for number in range(nbytes // PARCEL_BYTES):
            if len(under_way) == DEPTH:
                _until_reached(under_way.popleft())
            move(self._memory[number % DEPTH].data_ptr(), PARCEL_BYTES, self._stream.handle, _SECONDS)
            under_way.append(self._stream.mark())
        for mark in under_way:
            _until_reached(mark)


class BareNccl:
    """A process and communicators with it. Seconds of what its methods say."""

    def __init__(self, process: "subprocess.Popen[str]", end: _End) -> None:
        self._process = process
        self._end = end
        self.pid = process.pid

    def pull(self, nbytes: int) -> float:
        return self._move("send", "receive", nbytes)

    def push(self, nbytes: int) -> float:
        return self._move("receive", "send", nbytes)

    def _move(self, theirs: str, mine: str, nbytes: int) -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{theirs} {nbytes}\n")
        self._process.stdin.flush()
        begin = time.perf_counter()
        self._end.move(mine, nbytes)
        self._process.stdout.readline()
        return time.perf_counter() - begin


@contextmanager
def bare_nccl() -> Iterator[BareNccl]:
    """On the first GPU. This process needs an NCCL_HOSTID."""
    ids = nccl.library().unique_id() + nccl.library().unique_id()
    environment = {**os.environ, "NCCL_HOSTID": f"{os.environ['NCCL_HOSTID']} other"}
    with subprocess.Popen(
        [sys.executable, "-m", __name__, ids.hex()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        try:
            yield BareNccl(process, _End(1, ids))
        finally:
            process.kill()


def _until_reached(mark: Mark) -> None:
    end = time.monotonic() + _SECONDS
    while not mark.reached():
        assert time.monotonic() < end, "the other end does not move bytes"
        time.sleep(0.00005)


def _serve(ids: bytes) -> None:
    end = _End(0, ids)
    for line in sys.stdin:
        word, nbytes = line.split()
        end.move(word, int(nbytes))
        print("done", flush=True)


if __name__ == "__main__":
    _serve(bytes.fromhex(sys.argv[1]))
