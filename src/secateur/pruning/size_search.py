"""Search for the size of a network by cutting and measuring: by its latency or its accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from secateur.graph.dependency import DependencyGraph
from secateur.pruning.apply import apply_plan
from secateur.pruning.cost.latency_profiler import Stopwatch
from secateur.pruning.outcome import SizeTrial
from secateur.pruning.plan import PruningPlan
from secateur.runtime.errors import TargetError

TRIALS = 7
"""Networks that `bisect` makes: it finds the size to 1/128 of the range."""
LATENCY_ATTEMPTS = 6
"""Plans that are made and timed to reach a latency, at most."""
NEAR = 0.02
"""The search aims below the latency by this fraction, and stops within twice this fraction."""


def plan_in_time(
    model: nn.Module,
    dependencies: DependencyGraph,
    plan: Callable[[float], PruningPlan],
    fraction_left: float,
    least: float,
    stopwatch: Stopwatch,
) -> tuple[PruningPlan, float]:
    """Return a plan within a fraction of the latency of `model`, and its measured fraction.

    `plan(fraction)` returns the plan that is predicted to take a fraction, at least `least`.
    Predictions are some per cent off. So each network is cut and timed interleaved with the
    original by the `stopwatch`, and the next plan is made for a smaller or larger fraction. Of the
    plans within `fraction_left` the slowest is returned. Raises `TargetError` if there is none.
    """
    aim = max(fraction_left, least)
    best: tuple[PruningPlan, float] | None = None
    points = [(1.0, 1.0)]  # predicted and measured fractions
    for _ in range(LATENCY_ATTEMPTS):
        attempt = plan(aim)
        smaller = apply_plan(model, dependencies, attempt)
        measured = stopwatch.fraction_left(smaller)
        points.append((aim, measured))
        if measured <= fraction_left and (best is None or measured > best[1]):
            best = attempt, measured
        earlier, aim = aim, max(_next_aim(points, (1 - NEAR) * fraction_left), least)
        if (1 - 2 * NEAR) * fraction_left <= measured <= fraction_left or aim == earlier:
            break
    if best is None:
        fastest = min(measured for _, measured in points[1:])
        hint = "" if aim <= least else " (other work on the machine may be why: try again)"
        raise TargetError(
            f"target latency={fraction_left:g} is out of reach: of {len(points) - 1} networks that "
            f"were measured the fastest takes {fastest:.3f} of the time{hint}"
        )
    return best


def _next_aim(points: Sequence[tuple[float, float]], fraction_left: float) -> float:
    """Return the fraction to predict so that `fraction_left` is measured.

    It lies on the line between the nearest points `(predicted, measured)`. If all measurements are
    above `fraction_left`, the lowest prediction is scaled down in proportion: the fastest network
    may be a larger one, since times are noisy.
    """
    below = max((p for p in points if p[1] <= fraction_left), key=lambda p: p[1], default=None)
    if below is None:
        aim, measured = min(points)
        return aim * fraction_left / measured
    aim, measured = min((p for p in points if p[1] > fraction_left), key=lambda point: point[1])
    weight = (fraction_left - below[1]) / (measured - below[1])
    return below[0] + weight * (aim - below[0])


def bisect(attempt: Callable[[float], float], limit: float, least: float) -> tuple[SizeTrial, ...]:
    """Return sizes tried between `least` and 1, whose accuracy approaches the limit, by bisection.

    `attempt(fraction)` makes the network that keeps a fraction of the budget's quantity, and
    returns its top-1 fraction. Bisection assumes that a larger network is not less accurate, which
    holds up to noise.
    """
    trials: list[SizeTrial] = []
    low, high = least, 1.0
    for _ in range(TRIALS):
        middle = (low + high) / 2
        accuracy = attempt(middle)
        trials.append(SizeTrial(middle, accuracy, kept=accuracy >= limit))
        low, high = (low, middle) if trials[-1].kept else (middle, high)
    return tuple(trials)


def smallest_kept(trials: Sequence[SizeTrial]) -> float:
    """Return the fraction left by the smallest network within the limit."""
    return min(trial.fraction_left for trial in trials if trial.kept)
