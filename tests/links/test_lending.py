"""A pair's server end sends chunks from where they are, and nothing stays lent."""

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from protos import zero_ps_pb2 as pb
from protos.pair import DEPTH, PARCEL_BYTES, Pair
from protos.segment import Arena
from ps.errors import Timeout
from ps.links import Block
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


def test_a_stream_that_ends_in_the_middle_leaves_nothing_lent(link: PairLink, pair: _Pair) -> None:
    part = _part()
    answer = link.answer(1, [_block(part)])
    next(answer)
    answer.close()  # type: ignore[attr-defined]
    assert len(pair.parcels) == 1
    pair.parcels[0].arrived.set()
    wait_until(lambda: _readers(part) == 0, "it is given back")


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


def test_no_more_parcels_are_under_way_than_there_is_depth_for(link: PairLink, pair: _Pair) -> None:
    parts = [_part() for _ in range(3)]
    sending = threading.Thread(target=lambda: _parcels(link.answer(1, map(_block, parts))))
    sending.start()
    wait_until(lambda: len(pair.parcels) == DEPTH, "as many are sent as may be")
    assert parts[2].lent is None
    for number in range(6):
        wait_until(lambda number=number: len(pair.parcels) > number, "the next one is sent")
        assert len(pair.parcels) <= number + DEPTH
        pair.parcels[number].arrived.set()
    sending.join(TIMEOUT)
    wait_until(lambda: not any(map(_readers, parts)), "all is given back")


def test_what_may_leave_memory_is_copied(link: PairLink, pair: _Pair) -> None:
    def read(start: int, stop: int, head: bytes = b"") -> bytes:
        return b"\7" * (stop - start)

    assert _parcels(link.answer(1, [Block(100_000, read, lambda arena: None)])) == [100_000]
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
