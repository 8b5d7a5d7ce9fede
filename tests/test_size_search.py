from __future__ import annotations

from collections.abc import Callable

import pytest

from networks import Chain, random_images
from secateur.config import Budget
from secateur.graph.build import build_dependency_graph
from secateur.pruning import size_search
from secateur.pruning.cost.latency_profiler import Stopwatch
from secateur.pruning.outcome import SizeTrial
from secateur.pruning.plan import PruningPlan
from secateur.pruning.size_search import TRIALS, bisect, plan_in_time, smallest_kept
from secateur.runtime.errors import TargetError


def test_the_smallest_network_within_the_limit_is_found() -> None:
    asked: list[float] = []

    def attempt(fraction: float) -> float:
        asked.append(fraction)
        return fraction

    trials = bisect(attempt, 0.62, 0.2)
    assert len(trials) == TRIALS
    assert [trial.fraction_left for trial in trials] == asked
    assert all(trial.kept == (trial.fraction_left >= 0.62) for trial in trials)
    assert 0.62 <= smallest_kept(trials) < 0.62 + 0.8 / 2**TRIALS + 1e-9


def test_the_whole_network_is_left_if_all_others_are_too_inaccurate() -> None:
    trials = (SizeTrial(1.0, 0.9, kept=True), *bisect(lambda _: 0.1, 0.89, 0.1))
    assert smallest_kept(trials) == 1.0


LEAST = 0.3


class Timed:
    """Plans by fraction, and networks whose latency differs from the prediction."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, measured: Callable[[float], float]) -> None:
        self.asked: list[float] = []
        monkeypatch.setattr(size_search, "apply_plan", lambda model, *_: model)
        fraction = lambda *_: measured(self.asked[-1])  # noqa: E731
        monkeypatch.setattr(Stopwatch, "fraction_left", fraction)

    def plan(self, fraction: float) -> PruningPlan:
        assert fraction >= LEAST
        self.asked.append(fraction)
        return PruningPlan({}, Budget("latency", fraction), "l1")


def planned(timed: Timed, fraction: float) -> tuple[PruningPlan, float]:
    model = Chain()
    dependencies = build_dependency_graph(model, random_images(2))
    stopwatch = Stopwatch(model, random_images(2))
    return plan_in_time(model, dependencies, timed.plan, fraction, LEAST, stopwatch)


@pytest.mark.parametrize(
    "measured", [lambda f: 0.1 + 0.9 * f, lambda f: 0.8 * f, lambda f: f**2, lambda f: f]
)
def test_a_plan_that_is_too_slow_or_too_fast_is_made_again(
    monkeypatch: pytest.MonkeyPatch, measured: Callable[[float], float]
) -> None:
    timed = Timed(monkeypatch, measured)
    plan, left = planned(timed, 0.6)
    assert left == pytest.approx(measured(plan.budget.fraction_left))
    assert (1 - 2 * size_search.NEAR) * 0.6 <= left <= 0.6
    assert len(timed.asked) <= size_search.LATENCY_ATTEMPTS


def test_a_latency_that_no_plan_reaches_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for measured, fraction, fastest in (
        (lambda f: 0.5 + 0.5 * f, 0.5, r"latency=0\.5 .* 0\.65\d of the time"),
        (lambda f: f, 0.2, r"latency=0\.2 .* 0\.300 of the time"),
    ):
        with pytest.raises(TargetError, match=fastest):
            planned(Timed(monkeypatch, measured), fraction)


def test_a_plan_predicted_to_be_out_of_reach_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = Timed(monkeypatch, lambda f: 0.6 * f)
    plan, left = planned(timed, 0.2)
    assert plan.budget.fraction_left == pytest.approx(left / 0.6)
    assert (1 - 2 * size_search.NEAR) * 0.2 <= left <= 0.2


def test_smaller_networks_are_tried_where_a_larger_one_was_faster_by_chance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second network takes longer than the first, and both longer than the original."""
    for times in ([0.62, 0.63, 0.58], [1.05, 1.1, 0.59]):
        remaining = iter(times)
        timed = Timed(monkeypatch, lambda _, remaining=remaining: next(remaining))  # type: ignore[misc]
        _, left = planned(timed, 0.6)
        assert left == times[-1]
        assert timed.asked == sorted(timed.asked, reverse=True)
