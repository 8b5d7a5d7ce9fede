from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from networks import wired
from secateur.config import parse_budget
from secateur.pruning.allocation import (
    Counts,
    SearchSpace,
    equal_fractions,
    keep_fractions,
    lowest_scores,
    lowest_sensitivity,
)
from secateur.pruning.plan import make_space
from secateur.pruning.ranking import rank
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


def search_that_measures_everything(
    space: SearchSpace, sensitivity: dict[str, list[float]]
) -> Counts:
    """The counts of `lowest_sensitivity` on convex curves, without a measurement taken over."""
    counts = space.whole
    measure = space.pressure or space.measure

    def next_step(name: str) -> tuple[float, float, str, int] | None:
        now = measure(counts)
        for count in range(counts[name] - 1, 0, -1):
            gain = now - measure({**counts, name: count})
            if gain > 1e-9 * now or count == 1:
                whole = space.whole[name]
                curve = sensitivity[name]
                loss = curve[whole - count] - curve[whole - counts[name]]
                return loss / gain if gain > 1e-9 * now else math.inf, loss, name, count
        return None

    queue = [step for name in counts if (step := next_step(name))]
    while queue and not space.fits(counts):
        queue.sort()
        name = queue.pop(0)[2]
        fresh = next_step(name)
        assert fresh is not None
        if queue and fresh[:2] > queue[0][:2] and fresh[0] > queue[0][0] * (1 + 1e-9):
            queue.append(fresh)
            continue
        counts = {**counts, name: fresh[3]}
        queue += [step for step in [next_step(name)] if step]
    gains = {}
    for name, count in counts.items():
        removed = space.whole[name] - count
        gains[name] = sensitivity[name][removed] - sensitivity[name][max(0, removed - 1)]
    for name in sorted(counts, key=lambda name: -gains[name]):
        more = {**counts, name: min(counts[name] + 1, space.whole[name])}
        counts = more if space.fits(more) else counts
    return counts


@pytest.mark.parametrize("network", ["chain", "residual", "concat", "depthwise", "flattened"])
@pytest.mark.parametrize("target", ["macs=0.4", "params=0.6", "filters=0.5", "memory=0.8"])
def test_few_measurements_give_the_same_counts(
    network: str, target: str, generator: torch.Generator
) -> None:
    _, dependencies = wired(network, True)
    budget = parse_budget(target)
    scores = {n: torch.rand(len(g), generator=generator) for n, g in dependencies.groups.items()}
    sensitivity = {
        name: [0.0, *torch.rand(len(group), generator=generator).sort().values.cumsum(0).tolist()]
        for name, group in dependencies.groups.items()
    }
    space = make_space(rank(scores, dependencies, "random"), dependencies, budget)
    measured: list[Counts] = []

    def measure(counts: Counts) -> float:
        measured.append(counts)
        return space.measure(counts)

    counting = replace(space, measure=measure)
    counts = lowest_sensitivity(counting, sensitivity)
    assert counts == search_that_measures_everything(space, sensitivity)
    removed = sum(space.whole.values()) - sum(counts.values())
    if space.pressure is None:
        assert len(measured) <= 1 + 3 * (removed + len(counts))
