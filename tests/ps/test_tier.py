"""The tier by itself: parts under a limit, whatever is asked for in whatever order."""

import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.errors import OutOfBudget, StorageFailed, Timeout
from ps.monitor import Patience
from ps.store import checksum
from ps.store.arrays import ChunkedArray
from ps.tier import Area, FarthestNextUse, LeastRecentlyUsed, Part, Policy, Tier

ELEMENTS = 20_000
SIZE = 81_920
"""Bytes of a part in memory: whole pages."""


def make_parts(area: Area, count: int, elements: int = ELEMENTS, padding: int = 0) -> list[Part]:
    arrays = [ChunkedArray(f"weight/w{n}", (elements,), (elements + padding,), torch.float32) for n in range(count)]
    return [Part(f"w{n}", (elements,), torch.float32, (area, array, 0)) for n, array in enumerate(arrays)]


def fill(tier: Tier, part: Part, value: float) -> None:
    with tier.lease(fresh=[part]):
        part.tensor.fill_(value)
        part.changed()


def wait_until(ready: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 10
    while not ready():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.01)


def check(tier: Tier, part: Part, value: float) -> None:
    with tier.lease([part]):
        assert torch.equal(part.tensor, torch.full(part.shape, value))


@pytest.fixture
def area(tmp_path: Path) -> Area:
    return Area(tmp_path / "working")


@pytest.fixture
def tier() -> Iterator[Tier]:
    tier = Tier(8 * SIZE)
    yield tier
    tier.close()


def test_parts_that_do_not_fit_come_back_from_disk(tier: Tier, area: Area) -> None:
    parts = make_parts(area, 30, padding=7)
    for number, part in enumerate(parts):
        fill(tier, part, number)
    assert tier.spilled_bytes >= 22 * SIZE
    for number, part in enumerate(parts):
        check(tier, part, number)
    assert tier.peak_bytes <= 8 * SIZE


def test_spill_files_are_a_plain_zarr_group(tier: Tier, area: Area) -> None:
    parts = make_parts(area, 10)
    for number, part in enumerate(parts):
        fill(tier, part, number)
    tier.save(parts)
    group = zarr.open_group(area.folder, mode="r")
    assert all((group[f"weight/w{number}"][:] == number).all() for number in range(10))


def test_a_clean_part_leaves_without_being_written(tier: Tier, area: Area) -> None:
    parts = make_parts(area, 16)
    for part in parts:
        fill(tier, part, 1)
    tier.save(parts)
    written = tier.bytes_written
    for _ in range(3):
        for part in parts:
            check(tier, part, 1)
    assert tier.bytes_written == written
    assert tier.bytes_read > 16 * ELEMENTS * 4


def test_a_file_that_something_links_to_is_never_written_again(tier: Tier, area: Area, tmp_path: Path) -> None:
    parts = make_parts(area, 20)
    for part in parts:
        fill(tier, part, 1)
    tier.save(parts)
    links = [tmp_path / f"link{number}" for number in range(20)]
    for part, link in zip(parts, links, strict=True):
        assert part.file is not None
        link.hardlink_to(part.file.path)
    for value in (2, 3, 4):
        for part in parts:
            fill(tier, part, value)
        tier.save(parts)
    once = torch.ones(ELEMENTS).numpy().tobytes()
    assert all(link.read_bytes() == once for link in links)
    for part in parts:
        check(tier, part, 4)


def test_files_of_before_are_written_over_when_nothing_links_to_them(tier: Tier, area: Area) -> None:
    (part,) = make_parts(area, 1)
    for value in range(5):
        fill(tier, part, value)
        tier.save([part])
    files = [file for file in area.folder.rglob("*") if file.is_file() and file.name != "zarr.json"]
    assert len(files) == 2, "the part's and a spare one"


def test_more_than_can_ever_fit_is_refused_at_once_with_both_sizes(tier: Tier, area: Area) -> None:
    parts = make_parts(area, 7)
    with pytest.raises(OutOfBudget, match=r"the update needs 560.0 KiB .* has 480.0 KiB .* start it with --memory"):
        tier.lease(parts, what="the update")
    with pytest.raises(OutOfBudget, match="a gradient comes in 316.0 KiB at once"):
        tier.incoming((ELEMENTS * 4,), torch.float32, "a gradient")


def test_who_waits_too_long_is_told_for_what(tier: Tier, area: Area) -> None:
    parts = make_parts(area, 12)
    with (
        tier.lease(fresh=parts[:6]),
        pytest.raises(Timeout, match="480.0 KiB in memory, so that w7 finds room"),
    ):
        tier.lease(fresh=[parts[7]], patience=Patience.of(0.2))
    first, second = (tier.incoming((ELEMENTS,), torch.float32, "data") for _ in range(2))
    with pytest.raises(Timeout, match=r"160.0 KiB on their way in, so that data finds room"):
        tier.incoming((ELEMENTS,), torch.float32, "data", Patience.of(0.2))
    tier.give_back(first)
    tier.adopt(parts[0], second)
    tier.give_back(tier.incoming((ELEMENTS,), torch.float32, "data", Patience.of(1)))
    assert tier.resident_bytes == SIZE


def test_what_is_saved_for_a_commit_has_its_checksum_counted_from_memory(area: Area) -> None:
    """What leaves memory has not: most of it changes before a commit, and counting takes time of every step."""
    tier = Tier(8 * SIZE, LeastRecentlyUsed())
    parts, others = (made := make_parts(area, 12, padding=5000))[:4], made[4:]
    for number, part in enumerate(parts):
        fill(tier, part, number)
    tier.save(parts)
    for part in parts:
        assert part.file is not None and part.file.crc32c == checksum.of_file(part.file.path)
    for part in [*parts, *others]:
        fill(tier, part, 9)
    for part in parts:
        assert part.buffer is None and part.file is not None and part.file.crc32c is None
    tier.close()


def test_a_missing_or_cut_file_is_an_error_that_names_it(tier: Tier, area: Area) -> None:
    lost: list[str] = []
    area.on_loss = lost.append
    parts = make_parts(area, 16)
    for part in parts:
        fill(tier, part, 1)
    tier.save(parts)
    away = [part for part in parts if part.buffer is None]
    missing, cut = (part.file.path for part in away[:2] if part.file is not None)
    missing.unlink()
    os.truncate(cut, 100)
    with pytest.raises(StorageFailed, match=rf"cannot read w\d+ back from {missing}: No such file"):
        tier.lease([away[0]])
    with pytest.raises(StorageFailed, match=rf"from {cut}: it has 100 bytes, and 80000 were written"):
        tier.lease([away[1]])
    assert len(lost) == 2 and "start the trainers again" in lost[0]
    check(tier, away[2], 1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for some 2 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_part_on_disk_moves_to_another_disk(tier: Tier, area: Area, small_disk: Path) -> None:
    sources, targets = make_parts(Area(small_disk / "working"), 12), make_parts(area, 12)
    for number, part in enumerate(sources):
        fill(tier, part, number)
    assert any(part.buffer is None for part in sources)
    for source, target in zip(sources, targets, strict=True):
        tier.move(source, target)
    for number, part in enumerate(targets):
        check(tier, part, number)


def test_a_full_disk_is_an_error_that_names_the_file_and_nothing_is_lost(tier: Tier, small_disk: Path) -> None:
    area = Area(small_disk / "working")
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1 << 20))
    parts = make_parts(area, 60)
    filled = 0
    with pytest.raises(StorageFailed, match=rf"cannot spill w\d+ to {small_disk}.*the disk is full.*free some space"):
        for filled, part in enumerate(parts):
            fill(tier, part, filled)
    assert filled > 8
    for number in range(filled):
        if parts[number].buffer is not None or number % 2:
            check_resident_or_skip(tier, parts[number], number)
    ballast.unlink()
    for number in range(filled, filled + 5):
        fill(tier, parts[number], number)
    for number in range(filled + 5):
        check(tier, parts[number], number)


def check_resident_or_skip(tier: Tier, part: Part, value: float) -> None:
    if part.buffer is not None:
        check(tier, part, value)


@pytest.mark.parametrize("policy", [LeastRecentlyUsed, FarthestNextUse])
def test_a_known_cycle_is_read_less_often_than_by_last_use(policy: type[Policy], area: Area) -> None:
    """Of a cyclic scan, last use keeps nothing that is needed next; the plan keeps what fits."""
    now = 0
    tier = Tier(12 * SIZE, policy())
    parts = make_parts(area, 16)
    for place, part in enumerate(parts):
        part.forecast = lambda place=place: now + (place - now - 1) % 16 + 1  # type: ignore[misc]
    for now, part in enumerate(parts):
        fill(tier, part, now)
    tier.save(parts)
    before = tier.bytes_read
    for now in range(16, 16 * 6):
        check(tier, parts[now % 16], now % 16)
    reads = (tier.bytes_read - before) / (ELEMENTS * 4 * 16 * 5)
    assert reads > 0.9 if policy is LeastRecentlyUsed else reads < 0.4
    tier.close()


def test_what_is_read_ahead_pushes_out_nothing_that_is_needed_sooner(area: Area) -> None:
    tier = Tier(8 * SIZE)
    parts = make_parts(area, 16)
    for place, part in enumerate(parts):
        part.forecast = lambda place=place: place  # type: ignore[misc]
        fill(tier, part, place)
    tier.save(parts)
    tier.ahead(parts)
    wait_until(lambda: all(part.buffer is not None and part.busy is None for part in parts[:7]), "parts to be read")
    read = tier.bytes_read
    tier.ahead(parts)
    time.sleep(0.1)
    assert tier.bytes_read == read
    assert [part.buffer is not None for part in parts] == [True] * 7 + [False] * 9
    tier.close()


def test_some_memory_is_kept_free_of_parts_that_nobody_uses(area: Area) -> None:
    tier = Tier(24 * SIZE)
    for number, part in enumerate(make_parts(area, 40)):
        fill(tier, part, number)
    wait_until(lambda: tier.resident_bytes <= 22 * SIZE, "parts to leave")
    # Who works with parts may have all of it.
    with tier.lease(fresh=make_parts(area, 18)):
        assert tier.resident_bytes >= 18 * SIZE
    tier.close()


def test_what_can_be_made_again_and_is_not_needed_is_not_written(area: Area) -> None:
    tier = Tier(8 * SIZE)
    parts = make_parts(area, 30)
    for part in parts:
        part.derivable, part.forecast = True, lambda: float("inf")
        fill(tier, part, 1)
    assert tier.bytes_written == 0
    assert not parts[0].filled
    tier.close()


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    count=st.integers(4, 30),
    limit=st.integers(8, 16),
    policy=st.sampled_from([LeastRecentlyUsed, FarthestNextUse]),
)
def test_whatever_threads_do_the_limit_is_kept_and_bytes_are_right(
    seed: int, count: int, limit: int, policy: type[Policy], tmp_path_factory: pytest.TempPathFactory
) -> None:
    area = Area(tmp_path_factory.mktemp("tier") / "working")
    tier = Tier(limit * SIZE, policy())
    parts = make_parts(area, count)
    locks = [threading.Lock() for _ in parts]
    values: list[float | None] = [None] * count
    failures: list[BaseException] = []

    def work(worker: int) -> None:
        chance = random.Random(seed + worker)
        try:
            for _ in range(25):
                step(chance)
                assert tier.peak_bytes <= limit * SIZE
        except BaseException as failure:
            failures.append(failure)

    def step(chance: random.Random) -> None:
        some = sorted(chance.sample(range(count), chance.randint(1, 4)))
        match chance.choice(["ahead", "adopt", "lease", "lease", "lease", "save"]):
            case "ahead":
                tier.ahead([parts[number] for number in some])
            case "save":
                for number in some:
                    with locks[number]:
                        tier.save([parts[number]])
            case "adopt":
                incoming = tier.incoming((ELEMENTS,), torch.float32, "data")
                value = float(chance.randint(0, 1000))
                incoming.tensor.fill_(value)
                with locks[some[0]]:
                    tier.adopt(parts[some[0]], incoming)
                    values[some[0]] = value
            case "lease":
                with tier.lease([parts[n] for n in some], scratch_bytes=chance.choice([0, SIZE // 2])):
                    for number in some:
                        with locks[number]:
                            use(chance, number)

    def use(chance: random.Random, number: int) -> None:
        part, value = parts[number], values[number]
        if value is not None:
            assert part.filled and torch.equal(part.tensor, torch.full((ELEMENTS,), value))
        if chance.random() < 0.5:
            values[number] = float(chance.randint(0, 1000))
            part.tensor.fill_(values[number])
            part.changed()
        elif chance.random() < 0.1:
            tier.empty(part)
            values[number] = None

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a deadlock"
    if failures:
        raise failures[0]
    tier.discard(parts)
    # What was under way when it was discarded gives its memory back when it is done.
    deadline = time.monotonic() + 20
    while (tier.resident_bytes, tier.spilled_bytes) != (0, 0):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    tier.close()
