from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.pruning.allocation import (
    Counts,
    SearchSpace,
    equal_fractions,
    keep_fractions,
    lowest_scores,
    lowest_sensitivity,
)
from secateur.runtime.errors import TargetError


def additive(sizes: dict[str, int], prices: dict[str, float], limit: float) -> SearchSpace:
    """Every channel of a group costs its price."""
    steps = {name: list(range(1, size + 1)) for name, size in sizes.items()}
    return SearchSpace(steps, lambda counts: sum(prices[n] * c for n, c in counts.items()), limit)


def all_counts(space: SearchSpace) -> list[Counts]:
    return [
        dict(zip(space.steps, counts, strict=True))
        for counts in itertools.product(*space.steps.values())
    ]


def total(sensitivity: dict[str, list[float]], space: SearchSpace, counts: Counts) -> float:
    return sum(sensitivity[name][space.whole[name] - count] for name, count in counts.items())


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(st.data())
def test_little_is_lost_and_the_target_is_met(data: st.DataObject) -> None:
    """On convex curves with prices that add up no counts are better by more than one step."""
    sizes = {name: data.draw(st.integers(1, 5)) for name in "abc"}
    prices = {name: data.draw(st.sampled_from([1.0, 2.0, 3.5])) for name in sizes}
    sensitivity = {}
    for name, size in sizes.items():
        steps = sorted(data.draw(st.floats(0, 10)) for _ in range(size))
        sensitivity[name] = [0.0, *itertools.accumulate(steps)]
    whole = sum(prices[name] * size for name, size in sizes.items())
    least = sum(prices.values())
    limit = least + data.draw(st.floats(0, 1)) * (whole - least)
    space = additive(sizes, prices, limit)
    counts = lowest_sensitivity(space, sensitivity)
    assert space.fits(counts)
    best = min(
        total(sensitivity, space, counts) for counts in all_counts(space) if space.fits(counts)
    )
    largest_step = max(
        sensitivity[name][removed + 1] - sensitivity[name][removed]
        for name, size in sizes.items()
        for removed in range(size)
    )
    assert total(sensitivity, space, counts) <= best + largest_step + 1e-9


def test_with_equal_prices_the_cheapest_channels_go() -> None:
    space = additive({"a": 3, "b": 3}, {"a": 1.0, "b": 1.0}, 4.0)
    sensitivity = {"a": [0.0, 5.0, 11.0, 99.0], "b": [0.0, 1.0, 3.0, 99.0]}
    assert lowest_sensitivity(space, sensitivity) == {"a": 3, "b": 1}


def test_steps_with_a_smaller_loss_come_first() -> None:
    space = additive({"a": 3, "b": 3}, {"a": 4.0, "b": 1.0}, 11.0)
    sensitivity = {"a": [0.0, 2.0, 4.0, 6.0], "b": [0.0, 1.0, 2.0, 3.0]}
    assert lowest_sensitivity(space, sensitivity) == {"a": 2, "b": 3}


def test_a_dear_step_does_not_hide_cheap_ones_behind_it() -> None:
    space = additive({"a": 5, "b": 5}, {"a": 1.0, "b": 1.0}, 7.0)
    sensitivity = {"a": [0.0, 3.0, 3.1, 3.2, 9.0, 9.0], "b": [0.0, 1.5, 3.0, 4.5, 6.0, 6.0]}
    assert lowest_sensitivity(space, sensitivity) == {"a": 2, "b": 5}


def test_a_maximum_comes_down_by_its_pressure() -> None:
    """No single group moves the maximum of several that are equal."""
    steps = {name: list(range(1, 9)) for name in "abc"}

    def peak(counts: Counts) -> float:
        return max(counts.values())

    def pressure(counts: Counts) -> float:
        return math.hypot(*(float(count) ** 8 for count in counts.values()))

    sensitivity = {name: [float(n) for n in range(9)] for name in "abc"}
    counts = lowest_sensitivity(SearchSpace(steps, peak, 5.0, pressure), sensitivity)
    assert counts == {"a": 5, "b": 5, "c": 5}


def test_only_allowed_numbers_stay() -> None:
    space = SearchSpace({"a": [4, 8], "b": [4, 8, 12]}, lambda c: sum(c.values()), 13.0)
    sensitivity = {"a": [float(n) for n in range(9)], "b": [0.1 * n for n in range(13)]}
    assert lowest_sensitivity(space, sensitivity) == {"a": 8, "b": 4}
    assert equal_fractions(space) == {"a": 4, "b": 8}


def test_the_lowest_scores_go_in_any_group() -> None:
    space = additive({"a": 3, "b": 3}, {"a": 1.0, "b": 1.0}, 4.0)
    assert lowest_scores(space, {"a": [5.0, 4.0, 3.0], "b": [9.0, 0.2, 0.1]}) == {"a": 3, "b": 1}
    # Another scale changes nothing.
    assert lowest_scores(space, {"a": [5.0, 4.0, 3.0], "b": [900, 20, 10]}) == {"a": 3, "b": 1}


def test_given_fractions_are_kept() -> None:
    space = additive({"layer1.a": 8, "layer1.b": 5, "head": 4}, {}, math.inf)
    fractions = keep_fractions(space, {"layer1.b": 0.2, "layer1.*": 0.5})
    assert fractions == {"layer1.a": 4, "layer1.b": 1, "head": 4}
    with pytest.raises(TargetError, match=r"no prunable group is called 'layer9\.\*'"):
        keep_fractions(space, {"layer9.*": 0.5})


def test_where_only_whole_blocks_bring_anything_whole_blocks_go() -> None:
    """As times of layers do, which fall in steps of several channels."""
    steps = {name: list(range(1, 33)) for name in "ab"}

    def milliseconds(counts: Counts) -> float:
        return float(sum(math.ceil(count / 8) for count in counts.values()))

    sensitivity = {
        "a": [0.1 * n for n in range(33)],
        "b": [0.3 * n for n in range(33)],
    }
    counts = lowest_sensitivity(SearchSpace(steps, milliseconds, 5.0), sensitivity)
    assert counts == {"a": 8, "b": 32}
