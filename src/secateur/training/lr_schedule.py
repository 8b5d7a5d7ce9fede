"""Learning rates: a factor on the largest one for every step, told by its number alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from secateur.config import ScheduleName

ONE_CYCLE_RISE = 0.3
"""Share of the steps over which one cycle rises; this and the two factors are torch's defaults."""
ONE_CYCLE_START = 1 / 25
ONE_CYCLE_END = 1 / 25 / 1e4


@dataclass(frozen=True)
class Schedule:
    """How the learning rate changes over `steps` steps."""

    name: ScheduleName
    steps: int
    warmup: int
    """Steps of a linear rise at the start, at most half of all; one cycle has a rise of its own."""
    step_at: tuple[float, ...] = ()
    """Shares of all steps at which `step` multiplies by `step_factor`."""
    step_factor: float = 0.1

    def factor(self, step: int) -> float:
        """What the largest learning rate is multiplied by at a step from 0 on."""
        warmup = min(self.warmup, self.steps // 2)
        if self.name != "one_cycle" and step < warmup:
            return (step + 1) / warmup
        return _SHAPES[self.name](self, step, warmup)


def _cosine(schedule: Schedule, step: int, warmup: int) -> float:
    """Half a cosine from 1 to 0 (Loshchilov & Hutter, 2017)."""
    return _fall(1.0, 0.0, (step - warmup) / max(1, schedule.steps - warmup))


def _one_cycle(schedule: Schedule, step: int, warmup: int) -> float:
    """A cosine up, then a longer one down (Smith & Topin, 2018); the momentum does not cycle."""
    del warmup
    top = ONE_CYCLE_RISE * schedule.steps
    if step < top:
        return _fall(ONE_CYCLE_START, 1.0, step / top)
    return _fall(1.0, ONE_CYCLE_END, (step - top) / max(1.0, schedule.steps - top))


def _step(schedule: Schedule, step: int, warmup: int) -> float:
    del warmup
    passed = sum(step >= share * schedule.steps for share in schedule.step_at)
    return schedule.step_factor**passed


def _fall(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


_SHAPES: dict[ScheduleName, Callable[[Schedule, int, int], float]] = {
    "cosine": _cosine,
    "one_cycle": _one_cycle,
    "step": _step,
}
