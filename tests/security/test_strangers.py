"""Somebody who has no business there connects to the sockets of links: gets nothing, and disturbs nobody."""

import contextlib
import os
import secrets
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

import trainer
from protos import pair, rendezvous
from protos import zero_ps_pb2 as pb
from protos.gloo_pair import GlooPair
from protos.segment import Arena
from ps import LocalCluster
from ps.links import shm
from ps.links.base import LinkRefused
from ps.links.shm import ShmKind


def name_of(address: str) -> str:
    return f"\0{address.partition('/')[2]}"


def knock(address: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(10)
    connection.connect(name_of(address))
    return connection


@pytest.fixture
def kind() -> Iterator[ShmKind]:
    kind = ShmKind()
    yield kind
    kind.close()


@pytest.fixture
def arena() -> Arena:
    return Arena(1 << 20)


def greet(kind: ShmKind, arena: Arena, token: str) -> socket.socket:
    connection = rendezvous.connect(kind.listening().address, 5)
    rendezvous.send_files(connection, token, arena.fd)
    return connection


def claim(kind: ShmKind, token: str) -> None:
    kind.accept(pb.LinkOffer(kind="shm", token=token))


# ---------------------------------------------------------------- shm


def test_no_memory_is_handed_over_before_a_session_claims_the_connection(kind: ShmKind, arena: Arena) -> None:
    token = secrets.token_hex(16)
    with greet(kind, arena, token) as mine, greet(kind, arena, secrets.token_hex(16)) as strangers:
        strangers.settimeout(1.0)
        with pytest.raises(TimeoutError):
            strangers.recv(1)
        claim(kind, token)
        _, (fd, *streams) = rendezvous.receive_files(mine, 3)
        for stream in streams:
            os.close(stream)
        os.close(fd)
        with pytest.raises(TimeoutError):
            strangers.recv(1)


@pytest.mark.parametrize("token", ["", "0" * 32])
def test_a_token_that_nobody_brought_claims_nothing(
    kind: ShmKind, arena: Arena, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shm, "_HANDSHAKE_SECONDS", 0.3)
    with greet(kind, arena, secrets.token_hex(16)), pytest.raises(LinkRefused, match="did not come"):
        claim(kind, token)


def test_a_connection_cannot_be_claimed_twice_nor_greet_twice(
    kind: ShmKind, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shm, "_HANDSHAKE_SECONDS", 0.3)
    token = secrets.token_hex(16)
    with greet(kind, arena, token):
        claim(kind, token)
        with pytest.raises(LinkRefused):
            claim(kind, token)
    token = secrets.token_hex(16)
    with greet(kind, arena, token) as first, greet(kind, arena, token) as second:
        assert second.recv(1) == b""
        rendezvous.send_files(first, secrets.token_hex(16), arena.fd)
        assert first.recv(1) == b""


def test_what_is_no_greeting_ends_the_connection(kind: ShmKind, tmp_path: Path) -> None:
    address = kind.listening().address
    for message in (b"x", b"x" * 10_000, b"\0"):
        with knock(address) as stranger:
            stranger.send(message)
            assert stranger.recv(1) == b""
    token = secrets.token_hex(16)
    file = tmp_path / "file"
    file.write_bytes(bytes(100))
    with knock(address) as stranger, file.open("rb") as shrinking:
        # Who shares a file could cut it short under the server's reads.
        rendezvous.send_files(stranger, token, shrinking.fileno())
        with pytest.raises(LinkRefused, match="no sealed segment"):
            claim(kind, token)


def test_silent_connections_are_ended_and_the_oldest_make_room(
    kind: ShmKind, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shm, "_MAX_UNCLAIMED", 20)
    before = len(os.listdir("/proc/self/fd"))
    silent = [knock(kind.listening().address) for _ in range(100)]
    token = secrets.token_hex(16)
    with greet(kind, arena, token) as mine:
        claim(kind, token)
        for fd in rendezvous.receive_files(mine, 3)[1]:
            os.close(fd)
        until(lambda: len(os.listdir("/proc/self/fd")) <= before + len(silent) + 20 + 4)
        assert silent[0].recv(1) == b""
        for stranger in silent:
            stranger.close()
        # The link is still there.
        mine.settimeout(0.5)
        with pytest.raises(TimeoutError):
            mine.recv(1)
    until(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_a_connection_that_no_session_claims_ends_in_time(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm, "_UNCLAIMED_SECONDS", 0.5)
    monkeypatch.setattr(shm, "_LOOK_SECONDS", 0.1)
    with contextlib.closing(ShmKind()) as kind, greet(kind, arena, secrets.token_hex(16)) as stranger:
        stranger.settimeout(20)
        assert stranger.recv(1) == b""


@pytest.mark.skipif(os.geteuid() != 0, reason="to be another user takes root")
def test_another_user_of_the_machine_is_turned_away(kind: ShmKind) -> None:
    script = f"""
import os, socket
os.setuid(65534)
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.settimeout(10)
connection.connect({name_of(kind.listening().address)!r})
print("ended" if connection.recv(1) == b"" else "let in")
"""
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=30)
    assert result.stdout == "ended\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="to be another user takes root")
def test_memory_that_is_handed_over_is_its_owners_alone(arena: Arena) -> None:
    """Whoever got hold of it could open it anew, were it not for its mode."""
    script = f"""
import os
os.setuid(65534)
for flags in (os.O_RDONLY, os.O_RDWR):
    try:
        os.open("/proc/self/fd/{arena.fd}", flags)
        print("opened")
    except PermissionError:
        print("refused")
"""
    result = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=30, pass_fds=[arena.fd]
    )
    assert result.stdout == "refused\nrefused\n"


# ---------------------------------------------------------------- gloo


PORT_AT = 20
"""In what a gloo end says of its address."""


def form(of: dict[int, str], stranger_at: int | None = None) -> dict[int, object]:
    """Makes a pair in two threads; the pair, or what went wrong, by rank.

    of: each end's secret. stranger_at: whose port somebody else connects to first, as gloo itself would.
    """
    addresses: dict[int, bytes] = {}
    known = {rank: threading.Event() for rank in (0, 1)}
    outcome: dict[int, object] = {}
    with contextlib.ExitStack() as strangers:

        def make(rank: int) -> None:
            def exchange(mine: bytes, receive) -> None:
                addresses[rank] = mine
                if rank == stranger_at:
                    (port,) = struct.unpack_from(">H", mine, PORT_AT)
                    for number in range(4):
                        stranger = strangers.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
                        # By it gloo tells connections apart.
                        stranger.send(struct.pack("<q", number))
                    time.sleep(0.3)
                known[rank].set()
                known[1 - rank].wait(5)
                receive(addresses[1 - rank])

            try:
                outcome[rank] = GlooPair(rank, "127.0.0.1", of[rank], exchange)
            except (RuntimeError, OSError) as error:
                outcome[rank] = error

        threads = [threading.Thread(target=make, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    return outcome


def test_the_ends_of_a_pair_make_sure_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair, "FORM_SECONDS", 3.0)
    assert all(isinstance(end, GlooPair) for end in form({0: "a" * 32, 1: "a" * 32}).values())
    for error in form({0: "a" * 32, 1: "b" * 32}).values():
        assert "somebody else connected" in str(error)


def test_who_takes_an_ends_place_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo itself takes the stranger for the other end."""
    monkeypatch.setattr(pair, "FORM_SECONDS", 2.0)
    for rank in (0, 1):
        outcome = form({0: "a" * 32, 1: "a" * 32}, stranger_at=rank)
        assert len(outcome) == 2
        for end in outcome.values():
            # At the end that calls rather than listens there is no place to take.
            assert isinstance(end, GlooPair) or "Timed out" in str(end)


@pytest.fixture(scope="module")
def plain_cluster() -> Iterator[LocalCluster]:
    with LocalCluster(1) as cluster:
        yield cluster


@pytest.mark.parametrize("link", ["gloo", "shm"])
def test_training_goes_on_beside_strangers_at_every_socket(
    plain_cluster: LocalCluster, job_name: str, link: str
) -> None:
    with trainer.connect(plain_cluster.addresses, job=job_name, links=[link]) as job, contextlib.ExitStack() as held:
        assert [each.kind for each in job.links] == [link]
        model = torch.nn.Linear(300, 300)
        trainer.offload(model, job)
        optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        process = psutil.Process(plain_cluster.pid(0))
        ports = {each.laddr.port for each in process.net_connections("tcp") if each.status == "LISTEN"}
        ports |= {each.laddr.port for each in psutil.Process().net_connections("tcp") if each.status == "LISTEN"}
        status = job.servers[0].describe(10)
        (shm_address,) = (offered.address for offered in status.links if offered.kind == "shm")
        for step in range(3):
            for port in ports:
                for message in (b"", struct.pack("<q", 0), struct.pack("<q", 1), secrets.token_bytes(500)):
                    stranger = held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
                    stranger.send(message)
            for message in (b"", secrets.token_bytes(100)):
                stranger = held.enter_context(knock(shm_address))
                if message:
                    stranger.send(message)
            model(torch.ones(2, 300)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert job.step == step + 1


def until(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)
