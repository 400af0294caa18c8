"""When chunks are used next: what a trainer states, what it did last, and where it is."""

import math

import torch

from ps.plan import Plan, PlannedUse
from ps.schedule import STEP, Schedule
from ps.shard import Shard
from ps.store import StoredParameter
from ps.tier import Tier


def make(count: int = 5) -> tuple[Shard, Schedule]:
    manifest = [StoredParameter(f"w{n}", (4, 4), torch.float32, "parameter", True) for n in range(count)]
    shard = Shard(0, 1, manifest, tier=Tier(1 << 30))
    return shard, shard.schedule


def upcoming(schedule: Schedule) -> list[tuple[str, int]]:
    return [(kind, chunk.parameter) for kind, chunk in schedule.upcoming("trainer", 1 << 20)]


def test_before_anything_is_known_it_is_forwards_and_back() -> None:
    shard, schedule = make(3)
    one, two, three = shard
    schedule.used("trainer", "pull", one, 0)
    assert upcoming(schedule)[:4] == [("pull", 1), ("pull", 2), ("pull", 2), ("gradient", 2)]
    # The one that is just gone by is needed last of the three.
    assert two.forecasts["weight"]() < three.forecasts["weight"]() < one.forecasts["weight"]() < STEP


def test_the_last_iteration_is_what_comes_next() -> None:
    shard, schedule = make(3)
    chunks = list(shard)
    for number in (2, 0, 1):
        schedule.used("trainer", "pull", chunks[number], 0)
    schedule.used("trainer", "pull", chunks[2], 1)
    assert upcoming(schedule) == [("pull", 0), ("pull", 1)]


def test_what_a_trainer_states_counts_more_than_what_it_did() -> None:
    shard, schedule = make(3)
    chunks = list(shard)
    uses = (PlannedUse("pull", 1), PlannedUse("pull", 2), PlannedUse("gradient", 2))
    schedule.follow(Plan(uses), shard.chunks_of())
    for step in range(2):
        schedule.used("trainer", "pull", chunks[0], step)
        schedule.used("trainer", "pull", chunks[1], step)
        assert upcoming(schedule) == [("pull", 2), ("gradient", 2)]


def test_going_forward_again_at_one_step_is_found_again() -> None:
    """As evaluations do."""
    shard, schedule = make()
    chunks = list(shard)
    for _ in range(3):
        for number in range(3):
            schedule.used("trainer", "pull", chunks[number], 0)
        assert upcoming(schedule)[:2] == [("pull", 3), ("pull", 4)]


def test_a_copy_that_the_next_update_replaces_is_never_needed() -> None:
    shard, schedule = make(3)
    chunks = list(shard)
    for number in (0, 1, 2):
        schedule.used("trainer", "pull", chunks[number], 0)
    assert chunks[1].forecasts["copy"]() < STEP
    for number in (2, 1, 0):
        schedule.used("trainer", "pull", chunks[number], 0)
    assert chunks[1].forecasts["copy"]() == math.inf
    chunks[1].version = 1
    assert STEP <= chunks[1].forecasts["copy"]() < 2 * STEP


def test_norms_come_before_the_update_once_there_were_some() -> None:
    shard, schedule = make(2)
    chunk = next(iter(shard))
    schedule.used("trainer", "pull", chunk, 0)
    for _ in range(2):
        schedule.used("trainer", "gradient", chunk, 0)
    update = chunk.forecasts["gradient"]()
    schedule.norm(0, None)
    assert chunk.forecasts["gradient"]() == update
    chunk.version = 1
    schedule.used("trainer", "pull", chunk, 1)
    schedule.used("trainer", "gradient", chunk, 1)
    assert chunk.forecasts["gradient"]() < chunk.forecasts["state"]()


def test_the_slowest_trainer_says_where_everybody_is() -> None:
    shard, schedule = make(3)
    chunks = list(shard)
    schedule.used("slow", "pull", chunks[0], 0)
    for number in range(3):
        schedule.used("fast", "pull", chunks[number], 0)
    forward, backward = 3, 11
    assert chunks[1].forecasts["weight"]() == forward
    schedule.forget("slow")
    schedule.used("fast", "pull", chunks[2], 0)
    assert chunks[1].forecasts["weight"]() == backward


def test_updates_come_in_the_order_of_the_pulls_of_the_next_iteration() -> None:
    shard, schedule = make(4)
    one, two, three, four = shard
    assert schedule.update_order() == [one, two, three, four]
    for kind, chunk in (("pull", three), ("pull", one), ("gradient", four), ("pull", one), ("pull", three)):
        schedule.used("trainer", kind, chunk, 0)
    schedule.used("trainer", "pull", three, 1)
    assert schedule.update_order() == [three, one, two, four]
    assert three.forecasts["state"]() < one.forecasts["state"]() < two.forecasts["state"]()


def test_an_update_comes_right_before_the_pull_that_waits_for_it() -> None:
    """And so after the pulls of what is updated before it, whose copies are needed sooner than it is."""
    shard, schedule = make(3)
    one, two, three = shard
    for kind, chunk in (("pull", one), ("pull", two), ("pull", three), ("gradient", three), ("gradient", two)):
        schedule.used("trainer", kind, chunk, 0)
    schedule.used("trainer", "pull", one, 1)
    two.version = 1
    assert two.forecasts["copy"]() < three.forecasts["state"]() < 2 * STEP
    three.version = 1
    assert two.forecasts["copy"]() < three.forecasts["copy"]() < two.forecasts["state"]()


def test_what_nobody_pulls_is_updated_last() -> None:
    shard, schedule = make(2)
    one, two = shard
    for step in range(2):
        schedule.used("trainer", "pull", two, step)
    assert two.forecasts["state"]() < one.forecasts["state"]()


def test_what_was_updated_right_after_its_gradient_is_expected_to_be_so_again() -> None:
    shard, schedule = make(2)
    one, two = shard
    schedule.updated(two, early=True)
    assert two.forecasts["state"]() < STEP / 4 < one.forecasts["state"]()
    assert schedule.is_early(two)
    schedule.updated(two, early=False)
    assert two.forecasts["state"]() > one.forecasts["state"]()
