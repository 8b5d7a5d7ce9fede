"""The metric after each stage as a dumbbell chart, zoomed to its values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from secateur.models.score import metric_text
from secateur.pipeline.result import RunResult, StageResult

MARGIN = 0.12
"""Free part of the axis beside the lowest and the highest value, of their distance."""
NARROWEST = {"%": 1.0, "dB": 0.1, "": 0.01}
"""Least distance between both ends of the axis, by the metric's unit."""
MOST_TICKS = 5


@dataclass(frozen=True)
class Mark:
    """A value on the axis."""

    name: str
    text: str
    place: float
    """Per cent of the axis, from its left end."""


@dataclass(frozen=True)
class StageChart:
    """What the chart shows: a line from the value before pruning to that after each stage."""

    title: str
    marks: tuple[Mark, ...]
    """The first is the network before pruning."""
    ticks: tuple[Mark, ...]
    unscaled: tuple[Mark, ...]
    """Networks between the cut and the stage that repairs it: written, since most are so far from
    the others that the axis would hide how these differ."""

    @property
    def description(self) -> str:
        """The chart in words, for screen readers."""
        return f"{self.title}: " + ", ".join(f"{mark.name} {mark.text}" for mark in self.marks)


def make_stage_chart(result: RunResult) -> StageChart:
    """Return the chart of the stages of a run."""
    unit = result.task.metric_unit
    scale = 100 if unit == "%" else 1
    drawn = [stage for stage in result.stages if not is_repaired(stage, result.stages)]
    values = [scale * stage.score.metric for stage in drawn]
    low, high = _axis(values, NARROWEST[unit], most=100 if unit == "%" else math.inf)

    def mark(stage: StageResult) -> Mark:
        name = stage.stage if stage.round == 1 else f"{stage.stage} ({stage.round})"
        place = 100 * (scale * stage.score.metric - low) / (high - low)
        return Mark(name, metric_text(stage.score.metric, unit), round(place, 2))

    step = _tick_step(high - low)
    ticks = [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
    digits = max(0, -math.floor(math.log10(step)))
    return StageChart(
        f"{result.accuracy_name} by stage",
        tuple(map(mark, drawn)),
        tuple(
            Mark("", f"{tick:.{digits}f}", round(100 * (tick - low) / (high - low), 2))
            for tick in ticks
        ),
        tuple(mark(stage) for stage in result.stages if is_repaired(stage, result.stages)),
    )


def is_repaired(stage: StageResult, stages: Sequence[StageResult]) -> bool:
    """Return whether a stage is a cut that another stage of its round follows."""
    rounds = [other.round for other in stages if other.stage not in ("before", "cut")]
    return stage.stage == "cut" and stage.round in rounds


def _axis(values: list[float], narrowest: float, most: float) -> tuple[float, float]:
    """Return both ends of an axis that values are drawn on."""
    width = max(max(values) - min(values), narrowest)
    middle = (max(values) + min(values)) / 2
    low, high = (middle + sign * width * (0.5 + MARGIN) for sign in (-1, 1))
    return low, max(max(values), min(high, most))


def _tick_step(width: float) -> float:
    """Return a step of 1, 2 or 5 times a power of ten, for at most `MOST_TICKS` ticks."""
    power = 10.0 ** math.floor(math.log10(width / MOST_TICKS))
    return next(factor * power for factor in (1, 2, 5, 10) if width / (factor * power) < MOST_TICKS)
