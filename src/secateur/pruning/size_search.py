"""The smallest network that keeps to a limit, found by halves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

TRIALS = 7
"""Networks that are made: the size is found to 1 / 128 of the range."""


@dataclass(frozen=True)
class SizeTrial:
    """A network of some size."""

    fraction_left: float
    """Of the target's quantity."""
    validation_top1_fraction: float
    kept: bool
    """Whether it kept to the limit."""


def bisect(attempt: Callable[[float], float], limit: float, least: float) -> tuple[SizeTrial, ...]:
    """Networks between `least` and 1 whose accuracy closes in on the limit.

    `attempt` makes the network that leaves a fraction and gives its top-1 fraction; taken is that a
    larger network is not worse, which holds but for noise.
    """
    trials: list[SizeTrial] = []
    low, high = least, 1.0
    for _ in range(TRIALS):
        middle = (low + high) / 2
        found = attempt(middle)
        trials.append(SizeTrial(middle, found, kept=found >= limit))
        low, high = (low, middle) if trials[-1].kept else (middle, high)
    return tuple(trials)


def smallest_kept(trials: Sequence[SizeTrial]) -> float:
    """The fraction left by the smallest network that kept to the limit."""
    return min(trial.fraction_left for trial in trials if trial.kept)
