"""The trace alone: items are small objects, no model and no servers."""

import random
from collections.abc import Iterable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import trace as tracing
from trainer.trace import Path, Trace


class Item:
    def __init__(self, name: str, numel: int = 1) -> None:
        self.name = name
        self.numel = numel

    def __repr__(self) -> str:
        return self.name


ITEMS = {
    name: Item(name, 1 + index) for index, name in enumerate("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
}


def items(names: str) -> list[Item]:
    return [ITEMS[name] for name in names]


def walk(
    trace: Trace[Item],
    used: str | Sequence[Item],
    *,
    key: object = "k",
    guess: str = "",
    complete: bool = True,
    family: object = None,
) -> list[bool]:
    """One pass; for each use whether it was expected."""
    used = items(used) if isinstance(used, str) else used
    trace.begin(key, lambda: items(guess), family)
    expected = [trace.use(item) for item in used]
    trace.end(complete=complete)
    return expected


def share(passes: Iterable[list[bool]]) -> float:
    flat = [hit for expected in passes for hit in expected]
    return sum(flat) / len(flat)


# ---------------------------------------------------------------- one path


def test_the_first_pass_follows_the_guess() -> None:
    assert all(walk(Trace(), "abcde", guess="abcde"))


def test_a_guess_in_another_order_costs_a_surprise_for_each_turn_of_it() -> None:
    trace: Trace[Item] = Trace()
    assert sum(walk(trace, "abcfde", guess="abcdef")) >= 3
    assert all(walk(trace, "abcfde"))


def test_without_a_guess_the_second_pass_is_expected() -> None:
    trace: Trace[Item] = Trace()
    assert not any(walk(trace, "abcde"))
    assert all(walk(trace, "abcde"))
    assert trace.repaired == 0


def test_a_branch_that_is_not_taken_costs_one_surprise() -> None:
    trace: Trace[Item] = Trace()
    walk(trace, "abcdefgh")
    assert walk(trace, "abfgh") == [True, True, False, True, True]
    assert trace.repaired == 1


def test_a_branch_that_is_taken_again_costs_one_surprise() -> None:
    trace: Trace[Item] = Trace()
    walk(trace, "abcdefgh")
    walk(trace, "abfgh")
    # As the last time, which is "abfgh".
    assert walk(trace, "abcdefgh") == [True, True, False] + 5 * [True]


def test_another_branch_is_rejoined() -> None:
    trace: Trace[Item] = Trace()
    walk(trace, "abcxyzdef")
    walk(trace, "abcpqrdef")
    assert walk(trace, "abcxyzdef").count(False) <= 1
    assert walk(trace, "abcpqrdef").count(False) <= 1


@pytest.mark.parametrize("turns", [1, 2, 4, 5, 9])
def test_a_loop_of_another_length_costs_at_most_one_surprise_a_turn(turns: int) -> None:
    trace: Trace[Item] = Trace()
    walk(trace, "ab" + 3 * "cde" + "fg")
    expected = walk(trace, "ab" + turns * "cde" + "fg")
    assert expected.count(False) <= max(1, turns - 3 + 1)
    assert expected[-1], "after the loop the trace goes on"


def test_tied_items_are_told_apart_by_their_place() -> None:
    trace: Trace[Item] = Trace()
    walk(trace, "abcadae")
    assert all(walk(trace, "abcadae"))
    # Jumping over a part goes on after the right one of three.
    assert walk(trace, "abcae") == [True, True, True, True, False]


def test_of_places_that_fit_alike_the_nearest_ahead_is_taken() -> None:
    trace: Trace[Item] = Trace()
    walk(trace, "axbcdxefgxh")
    expected = walk(trace, "abcdxefgxh")
    assert expected == [True, False] + 8 * [True]


def test_items_that_nothing_else_uses_are_inserted() -> None:
    trace: Trace[Item] = Trace()
    walk(trace, "abcdef")
    assert walk(trace, "abcXYdef") == [True, True, True, False, False, True, True, True]
    assert all(walk(trace, "abcXYdef"))


def test_one_use_out_of_order_returns_to_its_place() -> None:
    trace: Trace[Item] = Trace()
    walk(trace, "abcdefghij")
    expected = walk(trace, "abchdefghij")
    assert expected == [True, True, True, False, False] + 6 * [True]
    assert trace.surprises == 1, "coming back is part of the same surprise, and a guess is no expectation"


def test_a_jump_that_turns_out_right_is_no_doubt_any_more() -> None:
    trace: Trace[Item] = Trace()
    walk(trace, "abcdefghij")
    assert walk(trace, "abhij") == [True, True, False, True, True]


# ---------------------------------------------------------------- several paths

A, B = "abcdefgh", "abxyzfgh"


def test_alternating_paths_are_expected_once_both_were_seen() -> None:
    trace: Trace[Item] = Trace()
    for used in (A, B):
        walk(trace, used)
    passes = [walk(trace, used) for used in 20 * (A, B)]
    assert share(passes) >= 0.9
    # Which one comes after which was seen after the second A.
    assert share(passes[2:]) == 1.0
    assert trace.repaired == 1


def test_paths_that_share_nothing_alternate() -> None:
    trace: Trace[Item] = Trace()
    for used in ("abcd", "wxyz"):
        walk(trace, used)
    assert share([walk(trace, used) for used in 20 * ("abcd", "wxyz")][2:]) == 1.0


def test_paths_taken_by_chance_cost_one_surprise_each() -> None:
    trace: Trace[Item] = Trace()
    generator = random.Random(0)
    ways = [A, B, "abpqrfgh", "abfgh"]
    for used in ways:
        walk(trace, used)
    for _ in range(100):
        assert walk(trace, generator.choice(ways)).count(False) <= 2
    assert trace.repaired == 3, "no way is learned twice"


def test_experts_chosen_by_chance_leave_the_rest_expected() -> None:
    """12 layers, of each the attention and 2 of 8 experts, in the order of their numbers."""
    generator = random.Random(0)
    attention = [Item(f"attention{layer}") for layer in range(12)]
    experts = [[Item(f"expert{layer}.{index}") for index in range(8)] for layer in range(12)]

    def route() -> list[Item]:
        used = []
        for layer in range(12):
            used.append(attention[layer])
            used += [experts[layer][index] for index in sorted(generator.sample(range(8), 2))]
        return used

    trace: Trace[Item] = Trace()
    for _ in range(8):
        walk(trace, route())
    found: dict[str, list[bool]] = {"attention": [], "expert": []}
    for _ in range(50):
        used = route()
        for item, hit in zip(used, walk(trace, used), strict=True):
            found["attention" if item in attention else "expert"].append(hit)
    of_attention, of_experts = share([found["attention"]]), share([found["expert"]])
    # Two independent draws of two out of eight have the same first one in 18 % of all cases, and likewise
    # the second: nobody can do much better who has only seen them.
    assert of_experts >= 0.12
    # What always comes is expected wherever the second expert was not mistaken for a first one.
    assert of_attention >= 0.7


def test_kinds_of_passes_have_paths_of_their_own() -> None:
    trace: Trace[Item] = Trace()
    walk(trace, "abc", key="train")
    walk(trace, "cba", key="eval")
    assert all(walk(trace, "abc", key="train"))
    assert all(walk(trace, "cba", key="eval"))


# ---------------------------------------------------------------- families


def test_ways_that_alternate_are_expected_of_kinds_that_were_never_seen() -> None:
    trace: Trace[Item] = Trace()
    ways = "abcdxy", "aefghxy"
    passes = [walk(trace, ways[number % 2], key=number, family="f") for number in range(20)]
    assert share(passes[3:]) == 1.0


def test_another_way_is_found_in_what_kinds_of_the_family_did() -> None:
    trace: Trace[Item] = Trace()
    walk(trace, "abcdxy", key=0, family="f")
    walk(trace, "aefghxy", key=1, family="f")
    walk(trace, "aefghxy", key=2, family="f")
    expected = walk(trace, "abcdxy", key=3, family="f")
    assert expected == [True, False, True, True, True, True]
    trace = Trace()
    walk(trace, "abcdxy", key=0)
    walk(trace, "aefghxy", key=1)
    assert not any(walk(trace, "aefghxy", key=2)), "of no family"


def test_a_path_takes_the_backward_of_the_one_like_it_in_its_family() -> None:
    trace: Trace[Item] = Trace()
    for number, (used, backward) in enumerate([("abc", "ca"), ("xyz", "zx")]):
        walk(trace, used, key=number, family="f")
        trace.paths(number)[-1].backward = Path(items(backward))
    walk(trace, "abc", key=2, family="f")
    backward = trace.paths(2)[-1].backward
    assert backward is not None and backward.items == items("ca") and not backward.seen


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from("bcdefghijkl"), max_size=40), st.integers(1, 50))
def test_a_family_is_small_and_refers_to_itself_only(ways: list[str], kinds: int) -> None:
    trace: Trace[Item] = Trace()
    for number, way in enumerate(ways):
        walk(trace, f"a{way}z", key=number % kinds, family="f")
    family = trace._family
    assert [path.items for path in family[-1:]] == [items(f"a{way}z") for way in ways[-1:]]
    assert len(family) == min(tracing.PATHS, len(set(ways))) == len({str(path.items) for path in family})
    assert all(path.next_of_family is None or path.next_of_family in family for path in family)


# ---------------------------------------------------------------- what is not kept


def test_passes_that_broke_off_do_not_disturb() -> None:
    trace: Trace[Item] = Trace()
    walk(trace, "abcdefgh")
    assert all(walk(trace, "abc", complete=False))
    walk(trace, "abxy", complete=False)
    assert all(walk(trace, "abcdefgh"))
    assert [path.items for path in trace.paths("k")] == [items("abcdefgh")]


def test_a_pass_that_uses_nothing_leaves_nothing() -> None:
    trace: Trace[Item] = Trace()
    walk(trace, "abc")
    walk(trace, "")
    assert all(walk(trace, "abc"))
    assert len(trace.paths("k")) == 1


def test_ending_twice_is_ending_once() -> None:
    trace: Trace[Item] = Trace()
    walk(trace, "abc")
    assert trace.end() is None


def test_the_paths_taken_last_are_remembered() -> None:
    trace: Trace[Item] = Trace()
    ways = [f"a{name}z" for name in "bcdefghijklmnop"]
    for used in ways:
        walk(trace, used)
        walk(trace, ways[0])
    kept = [path.items for path in trace.paths("k")]
    assert len(kept) == tracing.PATHS
    assert kept[-1] == items(ways[0])
    assert items(ways[1]) not in kept
    # What was forgotten is led to by nothing.
    assert all(path.then is None or path.then in trace.paths("k") for path in trace.paths("k"))


def test_the_kinds_of_passes_used_last_are_remembered() -> None:
    trace: Trace[Item] = Trace()
    for number in range(tracing.KEYS + 5):
        walk(trace, "abc", key=number)
        walk(trace, "abc", key=0)
    assert trace.paths(0)
    assert not trace.paths(1)
    assert trace.paths(tracing.KEYS + 4)
    assert not any(walk(trace, "abc", key=1)), "forgotten, and no trouble"


def test_gaps_follow_what_is_measured() -> None:
    trace: Trace[Item] = Trace()
    for gap in (1.0, 3.0):
        trace.begin("k", lambda: ())
        for item in items("abc"):
            trace.use(item, gap)
        path = trace.end()
    assert path is not None
    assert path.gaps == [2.0, 2.0, 2.0]


# ---------------------------------------------------------------- properties

_names = st.text(alphabet="abcdefgh", max_size=30)


@given(passes=st.lists(st.tuples(_names, st.sampled_from("kl"), st.booleans()), max_size=12), guess=_names)
@settings(max_examples=150, deadline=None)
def test_any_sequence_of_passes_is_followed(passes: list[tuple[str, str, bool]], guess: str) -> None:
    trace: Trace[Item] = Trace()
    uses = 0
    for used, key, complete in passes:
        trace.begin(key, lambda: items(guess))
        for number, item in enumerate(items(used)):
            before = trace.path, trace.place
            expected = trace.use(item)
            assert expected == (before[1] < len(before[0].items) and before[0].items[before[1]] is item)
            # After an item that the path has, the trace stands behind one of its uses.
            if expected or trace.path.places(item):
                assert trace.path.items[trace.place - 1] is item or (trace.path, trace.place) == before
            assert 0 <= trace.place <= len(trace.path.items)
            assert list(trace.seen) == items(used)[: number + 1]
            uses += 1
        path = trace.end(complete=complete)
        assert (path is None) == (not complete or not used)
        assert path is None or path.items == items(used)
        assert len(trace.paths(key)) <= tracing.PATHS
    assert trace.repaired <= trace.surprises <= uses


@given(first=st.lists(_names, max_size=5), used=st.text(alphabet="abcdefgh", min_size=1, max_size=30))
@settings(max_examples=150, deadline=None)
def test_a_repeated_pass_is_expected_from_the_third_time_on(first: list[str], used: str) -> None:
    """From the second time on where nothing else was seen before it."""
    trace: Trace[Item] = Trace()
    for other in first:
        walk(trace, other)
    walk(trace, used)
    second = walk(trace, used)
    if not any(first):
        assert all(second)
    for _ in range(3):
        assert all(walk(trace, used))


@given(used=st.text(alphabet="abcdef", max_size=40))
@settings(max_examples=100, deadline=None)
def test_places_and_distances_are_those_that_counting_gives(used: str) -> None:
    path: Path[Item] = Path(items(used))
    for start in range(len(used) + 2):
        for name in "abcdefg":
            naive = next((i for i in range(start, len(used)) if used[i] == name), None)
            assert path.next_place(ITEMS[name], start) == naive
    for name in "abcdefg":
        assert list(path.places(ITEMS[name])) == [i for i, found in enumerate(used) if found == name]
    before = [path.elements_before(index) for index in range(len(used) + 1)]
    assert before[0] == 0
    assert [right - left for left, right in pairwise(before)] == [ITEMS[name].numel for name in used]
