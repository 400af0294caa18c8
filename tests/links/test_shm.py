"""The shm link does what every link does, and what only memory can get wrong."""

import errno
import os
import socket
import threading
from collections.abc import Iterator

import pytest
import torch

import trainer
from protos import rendezvous
from protos import zero_ps_pb2 as pb
from protos.frames import Data
from protos.segment import Arena
from ps import LocalCluster
from ps.links import Links
from tests.links.conformance import TIMEOUT, LinkConformance, Peer, wait_until


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with LocalCluster(1, lease=5) as cluster:
        yield cluster.addresses[0]


class TestShmLink(LinkConformance):
    kind = "shm"
    lends = True


def test_a_reader_whose_session_has_ended_learns_that_what_it_read_was_not_its_own_any_more(
    address: str, job_name: str
) -> None:
    with Peer(address, "shm", job_name, {"w": torch.zeros(2_000_000)}) as peer:
        deliver = peer.link.deliver
        ended = threading.Event()

        def late(response, pull):
            assert ended.wait(TIMEOUT)
            deliver(response, pull)

        peer.link.deliver = late
        future = peer.start_pull(0, torch.empty(2_000_000))
        peer.call("CloseSession")
        ended.set()
        with pytest.raises(trainer.ZeroPsError):
            future.result(TIMEOUT)


def test_regions_that_are_not_in_the_trainers_memory_are_refused(address: str, job_name: str) -> None:
    with Peer(address, "shm", job_name, {"w": torch.zeros(100_000)}) as peer:
        size = peer.job.outbox.arena.size
        for region in (pb.Region(offset=size - 100, size=400_000), pb.Region(offset=1 << 63, size=400_000)):

            def pack(push, header, region=region):
                header.regions.append(region)
                return iter(())

            peer.link._pack = pack
            with pytest.raises(trainer.ConfigError, match="does not share"):
                peer.push(0, torch.ones(100_000)).result(TIMEOUT)
        del peer.link._pack
        peer.push(0, torch.ones(100_000)).result(TIMEOUT)


def test_counts_that_cannot_be_right_end_the_link_and_nothing_else(address: str, job_name: str) -> None:
    with Peer(address, "shm", job_name, {"w": torch.zeros(100_000)}) as peer:
        peer.link._connection.send(rendezvous.encode_count(7))
        with pytest.raises(trainer.ConnectError, match="has ended|has left"):
            wait_until(lambda: peer.pull(0) is None, "the link to end")
    with Peer(address, "shm", f"{job_name}-next", {"w": torch.ones(100_000)}) as peer:
        assert (peer.pull(0) == 1).all()


def test_a_trainer_whose_server_is_not_there_gets_the_next_best_link_and_says_why(
    cluster: LocalCluster, job_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "this_host", lambda: "elsewhere")
    with trainer.connect(cluster.addresses, job=job_name) as job:
        said = "gloo (shm: the server runs on another host; nccl: the server has no GPU (zero-ps serve --device))"
        assert [link.describe() for link in job.links] == [said] * 2
        assert job.outbox is None


def test_a_system_without_such_memory_gets_the_next_best_link_and_says_why(
    cluster: LocalCluster, job_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> int:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(os, "memfd_create", fails)
    with trainer.connect(cluster.addresses, job=job_name) as job:
        assert "shm: the trainer cannot share memory: [Errno 12]" in job.links[0].describe()
    chosen = Links().choose([pb.LinkOffer(kind="shm", token="x"), pb.LinkOffer(kind="grpc")])
    assert chosen.link.kind == "grpc"
    assert "the server cannot share memory" in chosen.not_chosen[0].reason


def test_only_shm_allowed_and_not_possible_is_an_error_with_the_reason(
    cluster: LocalCluster, job_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "this_host", lambda: "elsewhere")
    with pytest.raises(trainer.RequestRefused, match="another host"):
        trainer.connect(cluster.addresses, job=job_name, links=["shm"])


def test_a_token_that_nobody_brought_is_refused() -> None:
    links = Links()
    try:
        chosen = links.choose([pb.LinkOffer(kind="shm", token="nobody"), pb.LinkOffer(kind="grpc")])
        assert chosen.link.kind == "grpc" and "socket" in chosen.not_chosen[0].reason
    finally:
        links.close()


def test_processes_of_another_user_are_refused() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        rendezvous.check_peer(ours)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "geteuid", lambda: 12345)
            with pytest.raises(PermissionError, match="different users"):
                rendezvous.check_peer(ours)


def test_a_full_arena_sends_in_messages(address: str, job_name: str) -> None:
    with Peer(address, "shm", job_name, {"w": torch.zeros(1_000_000)}) as peer:
        taken = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Arena, "take", lambda self, nbytes: taken.append(nbytes) or _full())
            peer.push(0, torch.ones(1_000_000)).result(TIMEOUT)
        assert taken
        peer.step(0)
        assert (peer.pull(0, version=1) == -1).all()


@pytest.fixture(scope="module")
def limited() -> Iterator[str]:
    with LocalCluster(1, memory="32MiB", lease=5) as cluster:
        yield cluster.addresses[0]


PARAMETERS = {f"w{n}": torch.full((500_000,), float(n)) for n in range(20)}
"""2 MB each, and more than the server's memory with what updates take."""


class Unread:
    """Has a trainer not say that it has read what it was lent. regions: how many came."""

    def __init__(self, peer: Peer) -> None:
        self.regions = 0
        self._deliver = peer.link.deliver
        peer.link.deliver = self._count
        peer.link._connection = self

    def _count(self, response, pull):
        self.regions += 0 if isinstance(response, Data) else len(response.regions)
        self._deliver(response, pull)

    def send(self, data: bytes) -> None: ...

    def shutdown(self, how: int) -> None: ...

    def close(self) -> None: ...


def test_what_may_leave_memory_is_lent_as_a_copy(limited: str, job_name: str) -> None:
    with Peer(limited, "shm", job_name, PARAMETERS) as peer:
        connection = peer.link._connection
        unread = Unread(peer)
        peer.link._connection = connection
        for dtype in (torch.float32, torch.bfloat16):
            for number, values in enumerate(PARAMETERS.values()):
                assert torch.equal(peer.pull(number, dtype=dtype), values.to(dtype))
        assert unread.regions == 2 * len(PARAMETERS)
        # The bytes are of one version, whatever becomes of the part.
        for number, values in enumerate(PARAMETERS.values()):
            peer.push(number, torch.ones_like(values)).result(TIMEOUT)
        peer.step(0)
        for number, values in enumerate(PARAMETERS.values()):
            assert torch.equal(peer.pull(number, version=1), values - 1)


def test_a_trainer_that_does_not_read_its_copies_gets_messages(limited: str, job_name: str) -> None:
    with Peer(limited, "shm", job_name, PARAMETERS) as peer:
        connection, unread = peer.link._connection, Unread(peer)
        for number, values in enumerate(PARAMETERS.values()):
            assert torch.equal(peer.pull(number), values)
        assert unread.regions == (8 << 20) // 2_000_000
        connection.send(rendezvous.encode_count(unread.regions))
        peer.link._connection = connection
        wait_until(lambda: peer.pull(0) is not None and unread.regions > 4, "copies to be lent again")


def _full() -> torch.Tensor:
    raise MemoryError("full")


@pytest.mark.parametrize("limit_mib", [4, 16])
def test_free_memory_is_kept_up_to_the_limit_of_an_arena(limit_mib: int) -> None:
    arena = Arena()
    arena.limit_bytes = limit_mib << 20
    held = [arena.take(1 << 20) for _ in range(24)]
    assert _resident_bytes(arena) == 24 << 20
    del held[2:]
    assert _resident_bytes(arena) == limit_mib << 20


def _resident_bytes(arena: Arena) -> int:
    return os.fstat(arena.fd).st_blocks * 512
