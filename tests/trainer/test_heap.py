"""When malloc's heap is given back."""

import pytest

from trainer import heap

MIB = 1 << 20


class Process:
    """What malloc and the system would say. used: malloc's blocks. free: resident, and nobody's. beside: the rest."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.used, self.free, self.beside, self.trimmed = 100 * MIB, 0, 300 * MIB, 0
        monkeypatch.setattr(heap, "trim_heap", self.trim)
        monkeypatch.setattr(heap, "used_bytes", lambda: self.used)
        monkeypatch.setattr(heap, "_resident_bytes", lambda: self.used + self.free + self.beside)

    def trim(self) -> None:
        self.free = 0
        self.trimmed += 1


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Process:
    return Process(monkeypatch)


def test_memory_that_comes_and_goes_in_every_step_stays(process: Process) -> None:
    looked = heap.Heap()
    looked.gradient_left(64 * MIB, 0)
    trimmed = process.trimmed
    for _ in range(5):
        for used in (100, 80, 60, 40):
            # With the holes between blocks.
            process.used, process.free = used * MIB, (140 - used) * MIB
            looked.gradient_left(64 * MIB, 0)
    assert process.trimmed == trimmed


def test_holes_that_nothing_fills_are_given_back(process: Process) -> None:
    looked = heap.Heap()
    looked.gradient_left(64 * MIB, 0)
    for _ in range(20):
        process.free += 8 * MIB
        looked.gradient_left(64 * MIB, 0)
        assert process.free <= 16 * MIB + 50 * MIB


def test_holes_go_sooner_where_memory_is_limited(process: Process) -> None:
    looked = heap.Heap(tight=True)
    looked.gradient_left(64 * MIB, 0)
    for _ in range(20):
        process.free += 8 * MIB
        looked.gradient_left(64 * MIB, 0)
        assert process.free <= 16 * MIB


def test_other_memory_than_the_heap_does_not_count(process: Process) -> None:
    looked = heap.Heap()
    looked.gradient_left(64 * MIB, 0)
    trimmed = process.trimmed
    process.beside += 500 * MIB
    looked.gradient_left(64 * MIB, 500 * MIB)
    assert process.trimmed == trimmed


def test_it_is_looked_at_now_and_then(process: Process) -> None:
    looked = heap.Heap()
    for _ in range(63):
        looked.gradient_left(MIB, 0)
    assert process.trimmed == 0


def test_where_malloc_does_not_tell_it_gives_all_back(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "used_bytes", lambda: None)
    looked = heap.Heap()
    for _ in range(3):
        looked.gradient_left(64 * MIB, 0)
    assert process.trimmed == 3


def test_what_malloc_and_the_system_say_is_about_this_process() -> None:
    before = heap.used_bytes()
    if before is None:
        pytest.skip("this malloc does not tell")
    block = bytearray(256 * MIB)
    used = heap.used_bytes()
    assert used is not None and used - before >= 256 * MIB
    assert heap._resident_bytes() > 256 * MIB
    del block
