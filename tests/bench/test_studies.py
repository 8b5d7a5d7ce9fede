"""What studies share: the search of a budget for a wanted time."""

from __future__ import annotations

import pytest

from measurements import Measurement
from studies import next_budget, search_budget


def test_a_budget_is_found_for_a_time_that_falls_more_slowly() -> None:
    tried: list[float] = []

    def attempt(budget: float) -> Measurement:
        tried.append(budget)
        return {"time_left": 0.3 + 0.7 * budget}

    best = search_budget(attempt, 0.65, 0.01, 5)
    assert tried == [0.65, pytest.approx(0.5)]
    assert best == {"budget": pytest.approx(0.5), "time_left": pytest.approx(0.65)}


def test_the_nearest_attempt_counts_where_none_is_near() -> None:
    best = search_budget(lambda budget: {"time_left": 0.9}, 0.5, 0.01, 3)
    assert (best["time_left"], best["budget"]) == (0.9, 0.5)
    assert next_budget([(1.0, 1.0), (0.5, 0.9)], 0.4) == pytest.approx(-2.0)


def test_points_on_both_sides_count_for_more_than_near_ones() -> None:
    points = [(1.0, 1.0), (0.6, 0.64), (0.5, 0.56), (0.52, 0.58)]
    assert next_budget(points, 0.6) == pytest.approx(0.52 + 0.08 * 0.02 / 0.06)
