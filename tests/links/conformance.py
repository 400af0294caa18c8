"""What every link has to do. The tests of a link subclass `LinkConformance` and name its kind.

They go through real servers: a link is what two processes make of it.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import trainer
from protos import dtypes
from protos import zero_ps_pb2 as pb
from protos.layout import ChunkGrid
from ps import LocalCluster
from tests.ps.client import spec
from trainer.links import Pull, Push, PushKind

TIMEOUT = 30.0
DTYPES = [dtypes.to_torch(code) for code in pb.DType.values() if code != pb.DTYPE_UNSPECIFIED]
CHUNK_ELEMENTS = ChunkGrid.of((1 << 26,)).element_range(0)[1]


class Peer:
    """One trainer with one link to one server, and a job of its own on it. A context manager."""

    def __init__(
        self, address: str, kind: str, job_name: str, parameters: Mapping[str, torch.Tensor], *, read_only: bool = False
    ) -> None:
        self.job = trainer.connect([address], job=job_name, links=[kind], read_only=read_only, timeout=TIMEOUT)
        (self.link,) = self.job.links
        assert self.link.kind == kind
        self.server = self.job.servers[0]
        manifest = pb.Manifest(parameters=[spec(name, tensor) for name, tensor in parameters.items()])
        self.opened = self.call("OpenJob", manifest=manifest)
        self.parameters = list(parameters.values())
        if self.opened.needs_weights:
            for index, tensor in enumerate(self.parameters):
                self.push(index, tensor, kind=PushKind.WEIGHT).result(TIMEOUT)
            self.optimizer = pb.OptimizerGroup(parameters=range(len(self.parameters)))
            self.optimizer.options["lr"].number = 1.0
            self.call("SetOptimizer", class_name="SGD", groups=[self.optimizer])

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *error: object) -> None:
        self.job.close()

    def call(self, method: str, **fields):
        request = getattr(pb, f"{method}Request")(session_id=self.server.session_id, **fields)
        return self.server.call(method, request, TIMEOUT)

    def _chunks(self, index: int, tensor: torch.Tensor) -> tuple[list[tuple[int, int]], list[torch.Tensor]]:
        """Of a parameter: its chunks, and the bytes of a tensor of its shape for each."""
        grid = ChunkGrid.of(tuple(self.parameters[index].shape))
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        size = tensor.dtype.itemsize
        ranges = [grid.element_range(chunk) for chunk in range(grid.num_chunks)]
        return (
            [(index, chunk) for chunk in range(grid.num_chunks)],
            [raw[start * size : stop * size] for start, stop in ranges],
        )

    def push(self, index: int, tensor: torch.Tensor, *, kind: PushKind = PushKind.GRADIENT, step: int = 0, sequence=0):
        chunks, sources = self._chunks(index, tensor)
        return self.link.push(Push(kind, step, chunks, sources, tensor.dtype, sequence))

    def start_pull(self, index: int, target: torch.Tensor, *, version: int = 0, timeout: float = TIMEOUT):
        """target: of the parameter's shape, contiguous; its dtype is that on the wire."""
        chunks, destinations = self._chunks(index, target)
        return self.link.pull(Pull(version, chunks, destinations, target.dtype, timeout))

    def pull(self, index: int, *, version: int = 0, dtype: torch.dtype | None = None) -> torch.Tensor:
        like = self.parameters[index]
        target = torch.empty(like.shape, dtype=dtype or like.dtype)
        self.start_pull(index, target, version=version).result(TIMEOUT)
        return target

    def step(self, step: int) -> None:
        """A step and `zero_grad`."""
        self.call("Step", step=step, groups=[pb.OptimizerGroup(options=self.optimizer.options)])
        self.call("ZeroGrad", step=step + 1)


def wait_until(ready: Callable[[], bool], what: str, seconds: float = TIMEOUT) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def shared_mappings(pid: int | str = "self") -> int:
    """How many segments a process has mapped."""
    return Path(f"/proc/{pid}/maps").read_text().count("memfd:zero-ps")


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


class LinkConformance:
    """prelude: what a trainer in another process runs first. lends: whether what leaves is read where it is."""

    kind: ClassVar[str]
    lends: ClassVar[bool] = False
    prelude: ClassVar[str] = ""

    @classmethod
    def start(cls, **options: Any) -> LocalCluster:
        """A server that has this kind of link."""
        return LocalCluster(1, **options)

    @pytest.fixture(scope="class")
    @classmethod
    def cluster(cls) -> Iterator[LocalCluster]:
        with cls.start(lease=5) as cluster:
            yield cluster

    @pytest.fixture
    def open(self, cluster: LocalCluster, job_name: str) -> Iterator[Callable[..., Peer]]:
        peers: list[Peer] = []

        def new(parameters: Mapping[str, torch.Tensor], **options: object) -> Peer:
            peers.append(Peer(cluster.addresses[0], self.kind, job_name, parameters, **options))
            return peers[-1]

        yield new
        for peer in peers:
            peer.job.close()

    # ------------------------------------------------------------ bytes

    def test_bytes_of_all_sizes_arrive(self, open) -> None:
        sizes = [0, 1, 3, 4095, 4096, 4097, (32 << 10) - 1, 32 << 10, (1 << 20) + 1, CHUNK_ELEMENTS, CHUNK_ELEMENTS + 1]
        peer = open({str(size): random_tensor((size,), torch.uint8) for size in sizes})
        for index, tensor in enumerate(peer.parameters):
            assert torch.equal(peer.pull(index), tensor), sizes[index]

    @pytest.mark.parametrize("shape", [(), (3, 5), (301, 7, 99), (3000, 2001)])
    def test_shapes_arrive(self, open, shape) -> None:
        peer = open({"w": random_tensor(shape, torch.float32)})
        assert torch.equal(peer.pull(0), peer.parameters[0])

    def test_dtypes_arrive(self, open) -> None:
        peer = open({str(dtype): random_tensor((150_001,), dtype) for dtype in DTYPES})
        for index, tensor in enumerate(peer.parameters):
            assert torch.equal(peer.pull(index), tensor), tensor.dtype

    def test_another_dtype_than_the_stored_one_is_rounded_as_torch_rounds(self, open) -> None:
        peer = open({"large": torch.randn(1_000_001), "small": torch.randn(10)})
        for index, tensor in enumerate(peer.parameters):
            for dtype in (torch.bfloat16, torch.float16, torch.float64):
                assert torch.equal(peer.pull(index, dtype=dtype), tensor.to(dtype))

    @pytest.mark.parametrize("offset", [1, 3, 4095])
    def test_destinations_may_begin_anywhere_and_nothing_beside_them_is_written(self, open, offset: int) -> None:
        peer = open({"w": random_tensor((200_003,), torch.uint8)})
        around = torch.full((200_003 + 2 * offset,), 77, dtype=torch.uint8)
        peer.start_pull(0, around[offset:-offset]).result(TIMEOUT)
        assert torch.equal(around[offset:-offset], peer.parameters[0])
        assert (around[:offset] == 77).all() and (around[-offset:] == 77).all()

    @pytest.mark.skipif("ZERO_PS_TEST_LARGE" not in os.environ, reason="needs 7 GiB; set ZERO_PS_TEST_LARGE to run it")
    def test_more_than_2_gib_arrive_in_one_pull(self, open) -> None:
        size = (2 << 30) + 12_345
        large = torch.arange(size // 8 + 1).view(torch.uint8)[:size]
        peer = open({"large": large})
        assert torch.equal(peer.pull(0), large)

    # ------------------------------------------------------------ order

    def test_many_in_flight_arrive_in_the_order_in_which_they_were_asked_for(self, open) -> None:
        sizes = [100_000, 5, 700_000, 40_000, 0, 1_000_000]
        peer = open({str(i): torch.full((size,), float(i)) for i, size in enumerate(sizes)})
        arrived: list[int] = []
        targets, futures = [], []
        for number in range(120):
            target = torch.empty(sizes[number % 6])
            future = peer.start_pull(number % 6, target)
            if target.numel():  # Nothing is there at once.
                future.add_done_callback(lambda _, number=number: arrived.append(number))
            targets.append(target)
            futures.append(future)
        for future in futures:
            future.result(TIMEOUT)
        assert arrived == [number for number in range(120) if sizes[number % 6]]
        assert all((target == number % 6).all() for number, target in enumerate(targets))

    def test_both_directions_at_once(self, open) -> None:
        peer = open({"w": torch.zeros(3_000_000), "v": torch.randn(3_000_000)})
        pushes, pulls = [], []
        for sequence in range(8):
            pushes.append(peer.push(0, torch.full((3_000_000,), float(sequence)), sequence=sequence))
            pulls.append(torch.empty(3_000_000))
            pulls[-1] = (pulls[-1], peer.start_pull(1, pulls[-1]))
        for push in pushes:
            push.result(TIMEOUT)
        for target, future in pulls:
            future.result(TIMEOUT)
            assert torch.equal(target, peer.parameters[1])
        peer.step(0)
        assert (peer.pull(0, version=1) == -28).all()

    def test_gradients_of_all_sizes_and_dtypes_add_up(self, open) -> None:
        shapes = [(3,), (1000, 2003), (2, 3, 9001)]
        peer = open({f"w{len(shape)}": torch.zeros(shape) for shape in shapes})
        gradients = [[torch.randn(shape).to(dtype) for dtype in (torch.bfloat16, torch.float32)] for shape in shapes]
        for index, several in enumerate(gradients):
            for sequence, gradient in enumerate(several):
                peer.push(index, gradient, sequence=sequence).result(TIMEOUT)
        peer.step(0)
        for index, (first, second) in enumerate(gradients):
            assert torch.equal(peer.pull(index, version=1), -(first.float() + second))

    def test_a_pull_waits_for_its_version_and_those_behind_it_wait_too(self, open) -> None:
        peer = open({"w": torch.zeros(500_000)})
        target = torch.empty(500_000)
        early = peer.start_pull(0, target, version=1)
        with pytest.raises(TimeoutError):
            early.result(0.2)
        peer.push(0, torch.ones(500_000)).result(TIMEOUT)
        peer.step(0)
        early.result(TIMEOUT)
        assert (target == -1).all()

    def test_an_error_is_of_one_request_and_the_link_goes_on(self, open) -> None:
        peer = open({"w": torch.zeros(500_000), "v": torch.ones(500_000)})
        peer.push(0, torch.ones(500_000)).result(TIMEOUT)
        peer.step(0)
        assert (peer.pull(0, version=1) == -1).all()
        with pytest.raises(trainer.RequestRefused, match="is gone"):
            peer.pull(0, version=0)
        with pytest.raises(trainer.ZeroPsError):
            peer.push(0, torch.ones(500_000), step=7).result(TIMEOUT)
        assert (peer.pull(1, version=1) == 1).all()
        peer.push(0, torch.ones(500_000), step=1).result(TIMEOUT)
        peer.step(1)
        assert (peer.pull(0, version=2) == -2).all()

    def test_pushes_that_are_refused_do_not_disturb_those_behind_them(self, open) -> None:
        """Of some kinds of link bytes are on their way when the server refuses what they are of."""
        peer = open({"w": torch.zeros(3_000_000), "v": torch.zeros(500_000)})
        refused, counted = [], []
        for sequence in range(4):
            refused.append(peer.push(0, torch.full((3_000_000,), 100.0), step=7))
            counted.append(peer.push(1, torch.full((500_000,), float(sequence)), sequence=sequence))
            refused.append(peer.push(1, torch.full((500_000,), 100.0), sequence=17))
            counted.append(peer.push(0, torch.full((3_000_000,), float(sequence)), sequence=sequence))
        for push in counted:
            push.result(TIMEOUT)
        for push in refused:
            assert isinstance(push.exception(TIMEOUT), trainer.RequestRefused)
        peer.step(0)
        assert (peer.pull(0, version=1) == -6).all() and (peer.pull(1, version=1) == -6).all()

    def test_pulls_that_are_refused_do_not_disturb_those_behind_them(self, open) -> None:
        peer = open({"w": torch.zeros(3_000_000), "v": torch.full((500_000,), 2.0)})
        peer.push(0, torch.ones(3_000_000)).result(TIMEOUT)
        peer.step(0)
        assert (peer.pull(0, version=1) == -1).all()
        refused, answered = [], []
        for number in range(6):
            refused.append(peer.start_pull(0, torch.empty(3_000_000), version=0))
            target = torch.empty_like(peer.parameters[number % 2])
            answered.append((number % 2, target, peer.start_pull(number % 2, target, version=1)))
        for index, target, future in answered:
            future.result(TIMEOUT)
            assert (target == (-1, 2)[index]).all()
        for future in refused:
            assert isinstance(future.exception(TIMEOUT), trainer.RequestRefused)

    def test_what_is_read_while_updates_run_is_of_one_version(self, open) -> None:
        """A reader pulls as fast as it can, in two dtypes, while a trainer makes steps."""
        elements = 3_000_000
        peer = open({"w": torch.zeros(elements)})
        reader = open({"w": torch.zeros(elements)}, read_only=True)
        stop = threading.Event()
        seen: set[int] = set()
        wrong: list[object] = []

        def read() -> None:
            version = 0
            while not stop.is_set():
                dtype = torch.bfloat16 if version % 2 else torch.float32
                try:
                    values = reader.pull(0, version=version, dtype=dtype)
                except trainer.RequestRefused:
                    version += 1
                except trainer.ZeroPsError as error:
                    wrong.append(error)
                    return
                else:
                    seen.add(version)
                    if not (values == -version).all():
                        wrong.append((version, values.unique()))

        thread = threading.Thread(target=read)
        thread.start()
        try:
            for step in range(12):
                peer.push(0, torch.ones(elements), step=step).result(TIMEOUT)
                peer.step(step)
                assert (peer.pull(0, version=step + 1) == -step - 1).all()
                wait_until(lambda step=step: bool(wrong) or max(seen, default=-1) >= step, "the reader keeps up")
        finally:
            stop.set()
            # A pull of a version that never comes is ended with the link.
            reader.link.close()
            thread.join(TIMEOUT)
        assert not [found for found in wrong if isinstance(found, tuple)], wrong

    def test_a_slow_reader_gets_the_version_that_it_asked_for(self, open) -> None:
        """It hears of the bytes at once and takes them after two updates."""
        elements = 3_000_000
        peer = open({"w": torch.zeros(elements)})
        slow = open({"w": torch.zeros(elements)}, read_only=True)
        target, begin = torch.full((elements,), 5.0), threading.Event()
        deliver = slow.link.deliver

        def slowly(response, pull):
            heard.set()
            assert begin.wait(TIMEOUT)
            deliver(response, pull)

        heard, slow.link.deliver = threading.Event(), slowly
        arriving = slow.start_pull(0, target)
        assert heard.wait(TIMEOUT)
        for step in range(2):
            peer.push(0, torch.ones(elements), step=step).result(TIMEOUT)
            peer.step(step)
            assert (peer.pull(0, version=step + 1) == -step - 1).all()
        begin.set()
        try:
            arriving.result(TIMEOUT)
        except trainer.RequestRefused:
            # The rest had not been read when it changed.
            assert not self.lends
        else:
            assert (target == 0).all()

    # ------------------------------------------------------------ ends

    def test_closing_ends_what_is_outstanding_and_what_comes_later(self, open) -> None:
        peer = open({"w": torch.zeros(100_000)})
        waiting = peer.start_pull(0, torch.empty(100_000), version=1)
        peer.link.close()
        peer.link.close()
        with pytest.raises(trainer.ConnectError):
            waiting.result(TIMEOUT)
        for later in (peer.start_pull(0, torch.empty(100_000)), peer.push(0, torch.ones(100_000))):
            with pytest.raises(trainer.ConnectError):
                later.result(TIMEOUT)

    def test_a_server_that_is_killed_in_the_middle_fails_what_is_outstanding(self, job_name: str) -> None:
        with self.start() as cluster:
            peer = Peer(cluster.addresses[0], self.kind, job_name, {"w": torch.zeros(3_000_000)})
            targets = [torch.empty(3_000_000) for _ in range(20)]
            futures = [peer.start_pull(0, target) for target in targets]
            futures += [peer.start_pull(0, targets[0], version=1)]
            futures += [peer.push(0, torch.ones(3_000_000), sequence=i) for i in range(5)]
            cluster.kill(0)
            failures = [future.exception(TIMEOUT) for future in futures]
            assert all(error is None or isinstance(error, trainer.ConnectError) for error in failures), failures
            assert isinstance(failures[20], trainer.ConnectError)
            assert all((t == 0).all() for t, error in zip(targets, failures[1:20], strict=False) if error is None)
            peer.job.close()
        mine = shared_mappings()
        del peer, futures, failures
        wait_until(lambda: shared_mappings() <= max(0, mine), "the segments are gone")

    def test_a_trainer_that_is_killed_in_the_middle_leaves_nothing_behind(
        self, cluster: LocalCluster, job_name: str, tmp_path: Path
    ) -> None:
        pid = cluster.pid(0)
        with Peer(cluster.addresses[0], self.kind, f"{job_name}-first", {"w": torch.zeros(3_000_000)}) as first:
            assert (first.pull(0) == 0).all()
        before = shared_mappings(pid), open_files(pid)
        script = tmp_path / "victim.py"
        script.write_text(
            f"""
import sys, torch
{self.prelude}
from tests.links.conformance import Peer
peer = Peer({cluster.addresses[0]!r}, {self.kind!r}, {job_name!r}, {{"w": torch.zeros(3_000_000)}})
print("ready", flush=True)
target, sequence = torch.empty(3_000_000), 0
while True:
    futures = [peer.start_pull(0, target) for _ in range(4)]
    futures += [peer.push(0, torch.ones(3_000_000), sequence=sequence + i) for i in range(4)]
    sequence += 4
    [future.result(30) for future in futures]
"""
        )
        root = str(Path(__file__).resolve().parents[2])
        with subprocess.Popen(
            [sys.executable, str(script)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root}
        ) as victim:
            assert victim.stdout is not None
            assert victim.stdout.readline() == b"ready\n"
            time.sleep(0.3)
            victim.send_signal(signal.SIGKILL)
        # The next trainer takes the rank, and finds everything as if nobody had been there.
        with Peer(cluster.addresses[0], self.kind, job_name, {"w": torch.zeros(3_000_000)}) as peer:
            assert (peer.pull(0) == 0).all()
            optimizer = pb.OptimizerGroup(parameters=[0])
            optimizer.options["lr"].number = 1.0
            peer.optimizer = optimizer
            peer.call("SetOptimizer", class_name="SGD", groups=[optimizer])
            peer.push(0, torch.ones(3_000_000)).result(TIMEOUT)
            peer.step(0)
            assert (peer.pull(0, version=1) == -1).all()
        wait_until(
            lambda: shared_mappings(pid) <= before[0] and open_files(pid) <= before[1],
            "the server has given up what the trainer shared with it",
        )
