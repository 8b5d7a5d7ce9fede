"""Learning rate schedules: a factor on the peak rate, from the number of the step alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from secateur.config import ScheduleName

ONE_CYCLE_RISE = 0.3
"""Fraction of the steps in which one cycle rises; this and both factors are torch's defaults."""
ONE_CYCLE_START = 1 / 25
ONE_CYCLE_END = 1 / 25 / 1e4


@dataclass(frozen=True)
class Schedule:
    """A learning rate schedule over `steps` steps."""

    name: ScheduleName
    steps: int
    warmup: int
    """Steps of linear warm-up, at most half of all; `one_cycle` has its own."""
    step_at: tuple[float, ...] = ()
    """Fractions of all steps at which schedule `step` multiplies by `step_factor`."""
    step_factor: float = 0.1

    def factor(self, step: int) -> float:
        """Return the factor on the peak learning rate at a step, counted from 0."""
        warmup = min(self.warmup, self.steps // 2)
        if self.name != "one_cycle" and step < warmup:
            return (step + 1) / warmup
        return _SHAPES[self.name](self, step, warmup)


def _cosine(schedule: Schedule, step: int, warmup: int) -> float:
    """Return half a cosine from 1 to 0 (Loshchilov & Hutter, 2017)."""
    return _half_cosine(1.0, 0.0, (step - warmup) / max(1, schedule.steps - warmup))


def _one_cycle(schedule: Schedule, step: int, warmup: int) -> float:
    """Return a cosine up, then a longer one down (Smith & Topin, 2018); momentum is constant."""
    del warmup
    top = ONE_CYCLE_RISE * schedule.steps
    if step < top:
        return _half_cosine(ONE_CYCLE_START, 1.0, step / top)
    return _half_cosine(1.0, ONE_CYCLE_END, (step - top) / max(1.0, schedule.steps - top))


def _step(schedule: Schedule, step: int, warmup: int) -> float:
    del warmup
    decays = sum(step >= fraction * schedule.steps for fraction in schedule.step_at)
    return schedule.step_factor**decays


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


_SHAPES: dict[ScheduleName, Callable[[Schedule, int, int], float]] = {
    "cosine": _cosine,
    "one_cycle": _one_cycle,
    "step": _step,
}
