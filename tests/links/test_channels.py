"""Streams of messages over a socket of one host."""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
import torch

import trainer
from protos import local_messages
from protos import zero_ps_pb2 as pb
from ps import LocalCluster
from ps.links.local_stream import LocalStream
from trainer.links import Pull
from trainer.links.channels import SocketChannel
from trainer.links.shm import ShmLink

MIB = 1 << 20


def _pull_of(session_id: str) -> bytes:
    message = pb.PullRequest(session_id=session_id).SerializeToString()
    return struct.pack("<I", len(message)) + message


@pytest.fixture
def ends() -> Iterator[tuple[SocketChannel, socket.socket]]:
    mine, theirs = local_messages.pair()
    channel = SocketChannel("here:1", mine)
    with mine, theirs:
        yield channel, theirs
        channel.close()


def test_messages_arrive_in_order_whatever_their_sizes(ends: tuple[SocketChannel, socket.socket]) -> None:
    channel, theirs = ends
    sizes = [0, 1, 4, (1 << 16) - 1, 1 << 16, (1 << 16) + 1, 3 * MIB, 0, 17]
    sent = [bytes([number]) * size for number, size in enumerate(sizes)]
    for message in sent:
        channel.send([message])
    received = []
    for message in local_messages.receive(theirs, 8 * MIB):
        received.append(message)
        if len(received) == len(sent):
            break
    assert received == sent


def test_whoever_sends_waits_for_nobody_and_makes_no_message_before_there_is_room(
    ends: tuple[SocketChannel, socket.socket],
) -> None:
    channel, theirs = ends
    made = []

    def messages(number: int) -> Iterator[bytes]:
        for part in range(4):
            made.append((number, part))
            yield bytes([number, part]) * MIB

    began = time.monotonic()
    for number in range(8):
        channel.send(messages(number))
    assert time.monotonic() - began < 5
    assert len(made) <= 2, "the rest is made when there is room for it"
    received = []
    for message in local_messages.receive(theirs, 8 * MIB):
        received.append(tuple(message[:2]))
        if len(received) == 32:
            break
    assert received == [(number, part) for number in range(8) for part in range(4)]


def test_a_message_that_cannot_be_made_ends_the_stream_with_the_reason(
    ends: tuple[SocketChannel, socket.socket],
) -> None:
    channel, theirs = ends

    def messages() -> Iterator[bytes]:
        yield bytes(8 * MIB)
        raise ValueError("no more of them")

    reading = threading.Thread(target=lambda: theirs.makefile("rb").read())
    channel.send(messages())
    reading.start()
    with pytest.raises(ValueError, match="no more of them"):
        list(channel.responses())
    reading.join(10)
    assert not reading.is_alive()


def test_closing_wakes_who_reads_and_who_writes(ends: tuple[SocketChannel, socket.socket]) -> None:
    channel, _ = ends
    channel.send([bytes(8 * MIB)])
    reading = threading.Thread(target=lambda: list(channel.responses()))
    reading.start()
    time.sleep(0.1)
    channel.close()
    reading.join(10)
    assert not reading.is_alive()
    # Nothing happens to what comes late.
    channel.send([b"late"])


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (struct.pack("<I", 5) + b"four", "within a message"),
        (b"\1\0", "within a message"),
        (struct.pack("<I", (1 << 31) - 1), "are the most"),
    ],
)
def test_what_is_no_message_is_an_error(ends: tuple[SocketChannel, socket.socket], raw: bytes, match: str) -> None:
    channel, theirs = ends
    theirs.sendall(raw)
    theirs.shutdown(socket.SHUT_RDWR)
    with pytest.raises(trainer.ConnectError, match=match):
        list(channel.responses())


def test_a_server_says_why_it_ends_a_stream(ends: tuple[SocketChannel, socket.socket]) -> None:
    channel, theirs = ends
    local_messages.send_error(theirs, pb.Error(code=10, message="rank 3 is lost"))
    with pytest.raises(trainer.TrainerLost, match="server here:1: rank 3 is lost"):
        list(channel.responses())


def test_a_stream_is_answered_until_the_trainer_leaves(ends: tuple[SocketChannel, socket.socket]) -> None:
    channel, theirs = ends
    left = threading.Event()

    def answer(messages, cancel, cancelled):
        for message in messages:
            assert not cancelled()
            yield message.upper()
        assert cancelled()
        left.set()

    LocalStream("test", theirs).serve(answer)
    channel.send([b"one", b"two"])
    responses = channel.responses()
    assert [next(responses), next(responses)] == [b"ONE", b"TWO"]
    channel.close()
    assert left.wait(10)


def test_a_fault_of_the_server_ends_the_stream_and_says_so(ends: tuple[SocketChannel, socket.socket]) -> None:
    channel, theirs = ends

    def answer(messages, cancel, cancelled):
        for message in messages:
            yield message
            raise local_messages.StreamError(pb.Error(code=13, message="what the server looks for"))

    LocalStream("test", theirs).serve(answer)
    channel.send([b"one"])
    responses = channel.responses()
    assert next(responses) == b"one"
    with pytest.raises(trainer.ServerFailure, match="what the server looks for"):
        next(responses)


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (struct.pack("<I", (1 << 31) - 1), "these are no requests: a message of"),
        (struct.pack("<I", 4) + b"\xff" * 4, "this is no request of Pull"),
        (_pull_of("another"), "that link's session alone"),
    ],
    ids=["no message", "no request", "another session"],
)
def test_a_server_says_what_is_wrong_with_a_stream(
    cluster: LocalCluster, job_name: str, raw: bytes, match: str
) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        link = job.links[0]
        assert isinstance(link, ShmLink)
        link._pulls._channel._connection.sendall(raw)  # type: ignore[attr-defined]
        pull = Pull(version=0, chunks=[(0, 0)], destinations=[torch.empty(4, dtype=torch.uint8)], dtype=None, timeout=5)
        with pytest.raises(trainer.ConfigError, match=match):
            for _ in range(100):
                with contextlib.suppress(trainer.RequestRefused):
                    link.pull(pull).result(10)
                time.sleep(0.01)


def test_who_serves_may_end_a_stream_from_another_thread(ends: tuple[SocketChannel, socket.socket]) -> None:
    channel, theirs = ends

    def answer(messages, cancel, cancelled):
        threading.Timer(0.1, cancel).start()
        yield from messages

    LocalStream("test", theirs).serve(answer)
    assert list(channel.responses()) == []
