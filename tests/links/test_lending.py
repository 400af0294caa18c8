"""Chunks leave a server from where they are, over links that share no memory, and nothing stays lent."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from protos import MESSAGE_BYTES, frames
from protos import zero_ps_pb2 as pb
from protos.gloo_pair import GlooPair
from protos.pair import DEPTH, PARCEL_BYTES, SERVER, TRAINER, Pair
from protos.segment import Arena
from ps.errors import Timeout, VersionGone
from ps.links import Block, GrpcLink
from ps.links.pair import PairLink
from ps.tier import Part
from tests.links.conformance import TIMEOUT, wait_until

ELEMENTS = PARCEL_BYTES // 4 + 100_000
"""Of a part that leaves in two parcels."""


class _Parcel:
    def __init__(self, data: torch.Tensor) -> None:
        self.data = data
        self.arrived = threading.Event()
        self.error: RuntimeError | None = None

    def wait(self, seconds: float = TIMEOUT) -> None:
        assert self.arrived.wait(seconds)
        if self.error is not None:
            raise self.error


class _Pair(Pair):
    """Sends nothing before it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.parcels: list[_Parcel] = []

    def send(self, data: torch.Tensor, tag: int) -> _Parcel:
        self.parcels.append(_Parcel(data))
        return self.parcels[-1]

    def _receive(self, target: torch.Tensor, tag: int) -> _Parcel:
        raise NotImplementedError

    def abort(self) -> None:
        for parcel in self.parcels:
            parcel.error = RuntimeError("the other end is gone")
            parcel.arrived.set()


@pytest.fixture
def pair() -> _Pair:
    return _Pair()


@pytest.fixture
def link(pair: _Pair) -> Iterator[PairLink]:
    link = PairLink("gloo", pair)
    yield link
    link.close()
    pair.abort()


def _part(value: float = 0.0) -> Part:
    part = Part("w", (ELEMENTS,), torch.float32)
    part.hold(torch.full((ELEMENTS,), value))
    return part


def _block(part: Part) -> Block:
    def read(start: int, stop: int, head: bytes = b"") -> bytes:
        raise AssertionError("it is not copied")

    return Block(part.nbytes, read, part.lend)


def _parcels(answer: Iterator[tuple[bytes | pb.PullResponse, int]]) -> list[int]:
    """Sizes, as announced."""
    announced = []
    for response, _ in answer:
        assert isinstance(response, pb.PullResponse)
        announced += [parcel.size for parcel in response.parcels]
    return announced


def _readers(part: Part) -> int:
    assert part.lent is not None
    return part.lent.readers


def test_a_chunk_is_sent_from_where_it_is_and_given_back_when_all_of_it_has_left(link: PairLink, pair: _Pair) -> None:
    part = _part()
    assert _parcels(link.answer(1, [_block(part)])) == [PARCEL_BYTES, part.nbytes - PARCEL_BYTES]
    first, second = pair.parcels
    assert first.data.data_ptr() == part.tensor.data_ptr()
    assert second.data.data_ptr() == part.tensor.data_ptr() + PARCEL_BYTES
    first.arrived.set()
    wait_until(lambda: _readers(part) == 1, "the first parcel is given back")
    second.arrived.set()
    wait_until(lambda: _readers(part) == 0, "the second parcel is given back, though nobody asks for anything else")


def test_some_rows_of_a_chunk_are_sent_from_where_they_are(link: PairLink, pair: _Pair) -> None:
    part = _part()
    whole = _block(part)
    assert _parcels(link.answer(1, [Block(200_000, whole.read, part.lend, 4_004)])) == [200_000]
    assert pair.parcels[0].data.data_ptr() == part.tensor.data_ptr() + 4_004


def test_what_is_on_its_way_does_not_change_and_its_memory_stays_until_then(link: PairLink, pair: _Pair) -> None:
    part = _part(1.0)
    _parcels(link.answer(1, [_block(part)]))
    for value in (2.0, 3.0):
        part.about_to_change()
        part.tensor.fill_(value)
    sent = torch.cat([parcel.data for parcel in pair.parcels]).view(torch.float32)
    assert (sent == 1).all() and (part.tensor == 3).all()


def test_what_nobody_reads_any_more_changes_where_it_is(link: PairLink, pair: _Pair) -> None:
    part = _part()
    place = part.tensor.data_ptr()
    _parcels(link.answer(1, [_block(part)]))
    for parcel in pair.parcels:
        parcel.arrived.set()
    wait_until(lambda: _readers(part) == 0, "it is given back")
    part.about_to_change()
    assert part.tensor.data_ptr() == place


@pytest.mark.parametrize("end", ["failed", "closed"])
def test_a_link_that_ends_leaves_nothing_lent(link: PairLink, pair: _Pair, end: str) -> None:
    part = _part()
    _parcels(link.answer(1, [_block(part)]))
    if end == "closed":
        link.close()
        assert _readers(part) == 2, "it may still be read"
    pair.abort()
    wait_until(lambda: _readers(part) == 0, "it is given back")


def test_nobody_waits_for_the_rest_of_a_pair_that_is_broken(
    link: PairLink, pair: _Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = _part()
    _parcels(link.answer(1, [_block(part)]))
    monkeypatch.setattr(pair, "abort", lambda: None)
    pair.parcels[0].error = RuntimeError("the other end is gone")
    pair.parcels[0].arrived.set()
    wait_until(lambda: _readers(part) == 0, "both parcels are given back", 10)


def test_a_stream_that_ends_in_the_middle_leaves_nothing_lent(link: PairLink, pair: _Pair) -> None:
    parts = [_part(), _part()]

    def blocks() -> Iterator[Block]:
        for part in parts:
            yield _block(part)
            time.sleep(0.01)

    answer = link.answer(1, blocks())
    next(answer)
    answer.close()  # type: ignore[attr-defined]
    assert _readers(parts[1]) == 0
    for parcel in pair.parcels:
        parcel.arrived.set()
    wait_until(lambda: _readers(parts[0]) == 0, "it is given back")


def test_a_pair_that_cannot_send_leaves_nothing_lent(
    link: PairLink, pair: _Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(data: torch.Tensor, tag: int) -> None:
        raise RuntimeError("connection reset")

    monkeypatch.setattr(pair, "send", fails)
    part = _part()
    with pytest.raises(Timeout, match="connection reset"):
        _parcels(link.answer(1, [_block(part)]))
    assert _readers(part) == 0


def test_a_parcel_that_is_sent_while_the_link_is_closed_is_given_back(link: PairLink, pair: _Pair) -> None:
    part = _part()
    send = pair.send

    def late(data: torch.Tensor, tag: int) -> _Parcel:
        parcel = send(data, tag)
        link.close()
        parcel.arrived.set()
        return parcel

    pair.send = late  # type: ignore[method-assign]
    answer = link.answer(1, [_block(part)])
    next(answer)
    answer.close()  # type: ignore[attr-defined]
    assert _readers(part) == 0


def _copied(size: int) -> Block:
    """What may leave memory."""

    def read(start: int, stop: int, head: bytes = b"") -> bytes:
        return b"\7" * (stop - start)

    return Block(size, read, lambda arena: None)


@pytest.mark.parametrize("lent", [False, True])
def test_no_more_is_under_way_than_there_is_room_for(link: PairLink, pair: _Pair, lent: bool) -> None:
    room = 64 << 20 if lent else DEPTH * PARCEL_BYTES
    parts = [_part() for _ in range(10)]
    blocks = map(_block, parts) if lent else (_copied(part.nbytes) for part in parts)
    sending = threading.Thread(target=lambda: _parcels(link.answer(1, blocks)))
    sending.start()
    left = 0
    for number in range(20):
        wait_until(lambda number=number: len(pair.parcels) > number, "the next one is sent")
        assert sum(parcel.data.numel() for parcel in pair.parcels[left:]) <= room
        if number >= 3:
            pair.parcels[left].arrived.set()
            left += 1
    for parcel in pair.parcels[left:]:
        parcel.arrived.set()
    sending.join(TIMEOUT)
    assert not sending.is_alive()
    wait_until(lambda: not any(part.lent and part.lent.readers for part in parts), "all is given back")


def test_a_trainer_is_told_in_one_message_of_what_is_ready_at_once(
    link: PairLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ps.links.pair._TOGETHER_SECONDS", 60.0)
    parts = [Part("w", (100_000,), torch.float32) for _ in range(4)]
    for part in parts:
        part.hold(torch.zeros(100_000))
    ((response, num_bytes),) = link.answer(1, map(_block, parts))
    assert isinstance(response, pb.PullResponse)
    assert [parcel.size for parcel in response.parcels] == [400_000] * 4 and num_bytes == 1_600_000


def test_a_trainer_is_told_of_what_is_ready_when_the_next_took_longer(link: PairLink) -> None:
    def blocks() -> Iterator[Block]:
        yield _copied(100_000)
        time.sleep(0.01)
        yield _copied(200_000)
        time.sleep(0.01)
        yield _copied(300_000)

    answer = link.answer(1, blocks())
    assert [num_bytes for _, num_bytes in answer] == [100_000, 200_000, 300_000]


def test_an_error_in_the_middle_does_not_disturb_what_comes_next(link: PairLink, pair: _Pair) -> None:
    part = _part()

    def blocks() -> Iterator[Block]:
        yield _block(part)
        raise VersionGone("it was updated")

    with pytest.raises(VersionGone):
        _parcels(link.answer(1, blocks()))
    assert _readers(part) == 0 and not pair.parcels
    announced = [response for response, _ in link.answer(2, [_block(part)])]
    assert [parcel.tag for response in announced for parcel in response.parcels] == [1, 2]


def test_what_may_leave_memory_is_copied(link: PairLink, pair: _Pair) -> None:
    assert _parcels(link.answer(1, [_copied(100_000)])) == [100_000]
    assert (pair.parcels[0].data == 7).all()


@pytest.mark.parametrize("shared_first", [False, True])
def test_a_part_is_lent_to_links_that_share_memory_and_to_others(shared_first: bool) -> None:
    part, arena = _part(1.0), Arena()
    order: list[Callable[[], object]] = [lambda: part.lend(arena), lambda: part.lend(None)]
    lent = [lend() for lend in (order if shared_first else order[::-1])]
    assert arena.offset_of(part.tensor) is not None
    part.about_to_change()
    part.tensor.fill_(2.0)
    assert arena.offset_of(part.tensor) is not None
    assert all((each.tensor == 1).all() for each in lent)
    assert part.lend(None) not in lent


@pytest.fixture
def gloo_pairs() -> list[GlooPair]:
    """The server's end and the trainer's, both of this process."""
    addresses: list[queue.SimpleQueue[bytes]] = [queue.SimpleQueue(), queue.SimpleQueue()]

    def make(rank: int) -> GlooPair:
        def exchange(mine: bytes, receive: Callable[[bytes], None]) -> None:
            addresses[rank].put(mine)
            receive(addresses[1 - rank].get(timeout=TIMEOUT))

        return GlooPair(rank, "127.0.0.1", "secret", exchange)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(make, (SERVER, TRAINER)))


def test_a_trainer_that_takes_its_time_gets_what_was_lent_to_it(gloo_pairs: list[GlooPair]) -> None:
    server, trainer = gloo_pairs
    link, part = PairLink("gloo", server), _part(1.0)
    said = [parcel for response, _ in link.answer(1, [_block(part)]) for parcel in response.parcels]  # type: ignore[union-attr]
    part.about_to_change()
    part.tensor.fill_(2.0)
    for parcel in said:
        target = torch.empty(parcel.size, dtype=torch.uint8)
        trainer.receive(target, parcel.tag).wait()
        assert (target.view(torch.float32) == 1).all()
    link.close()


@pytest.mark.parametrize("end", ["trainer", "session"])
def test_nothing_stays_lent_over_gloo_when_a_trainer_leaves_in_the_middle(gloo_pairs: list[GlooPair], end: str) -> None:
    trainer = gloo_pairs.pop()
    link, part = PairLink("gloo", gloo_pairs.pop()), _part()
    said = [parcel for response, _ in link.answer(1, [_block(part)]) for parcel in response.parcels]  # type: ignore[union-attr]
    trainer.receive(torch.empty(said[0].size, dtype=torch.uint8), said[0].tag).wait()
    wait_until(lambda: _readers(part) == 1, "the first parcel is given back")
    if end == "session":
        link.close()
    # Its end of the connection is closed, as that of a process that dies is.
    del trainer
    wait_until(lambda: _readers(part) == 0, "the second parcel is given back", 10)
    link.close()


def test_a_chunk_that_is_cut_into_messages_is_lent_until_the_last_of_them() -> None:
    part, received = _part(1.0), b""
    some_rows = Block(3 * MESSAGE_BYTES + 12, _block(part).read, part.lend, 4_000)
    answer = GrpcLink().answer(7, [some_rows])
    for number, (message, num_bytes) in enumerate(answer):
        assert isinstance(message, bytes)
        data = frames.decode_pull(message)
        assert data.request_id == 7 and len(data.data) == num_bytes
        received += data.data
        if number == 1:
            part.about_to_change()
            part.tensor.fill_(2.0)
    assert len(received) == some_rows.num_bytes and set(received) == set(torch.ones(1).numpy().tobytes())
    assert part.lent is None, "the readers had another memory"


@pytest.mark.parametrize("end", ["read", "closed"])
def test_nothing_stays_lent_when_messages_end(end: str) -> None:
    part = _part()
    answer = GrpcLink().answer(7, [_block(part)])
    next(answer)
    assert _readers(part) == 1
    if end == "closed":
        answer.close()  # type: ignore[attr-defined]
    else:
        for _ in answer:
            pass
    assert _readers(part) == 0
