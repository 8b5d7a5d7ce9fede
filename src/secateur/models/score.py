"""Scores of networks, as a run folder keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from secateur.runtime.timing import LATENCY_BATCH

MetricUnit = Literal["%", "dB", ""]
"""Unit of a metric; a metric in per cent is kept as a fraction."""


def metric_text(value: float, unit: MetricUnit = "%", *, digits: int = 2) -> str:
    """Return a metric with its unit, as people read it: `91.20 %`."""
    if unit == "%":
        return f"{100 * value:.{digits}f} %"
    return f"{value:.{digits}f} dB" if unit == "dB" else f"{value:.{digits + 2}f}"


def change_text(change: float, unit: MetricUnit = "%", *, digits: int = 2) -> str:
    """Return the difference of two metrics with its sign and unit: `−0.31 points`."""
    number = 100 * change if unit == "%" else change
    text = f"{number:+.{digits if unit else digits + 2}f}".replace("-", "−")
    return text + {"%": " points", "dB": " dB", "": ""}[unit]


@dataclass(frozen=True)
class OutputDivergence:
    """How far a network's outputs are from the expected ones."""

    divergence: float
    """Mean KL divergence from the expected outputs, KL(expected ‖ actual), in nats; for softened
    outputs multiplied by the square of the temperature. Of values half their relative squared
    error."""
    agreement_fraction: float
    """Fraction of images for which both predict the same class; of labels or positions, if each
    image has several. Of values it is R²: 1 minus their squared error over their variance."""


@dataclass(frozen=True)
class Score:
    """A network's accuracy and cost."""

    metric: float
    """How good it is at its task: higher is better. For a classifier it is the fraction of images
    whose class is predicted, or of labels, if each image has several; for other tasks what
    `Task.metric_name` says, as a fraction if its unit is per cent."""
    top5_fraction: float | None
    """None with five classes or fewer, and if the task is not one class for each image."""
    loss: float | None
    """Mean cross-entropy in nats; of values half their relative squared error. None where there is
    nothing to compare with: without labels, and for detections."""
    images: int
    """Number of images that were scored."""
    macs: int
    """Multiply-accumulates for one image."""
    parameters: int
    latency_ms: float
    """Median time of a forward pass of `latency_batch` images; a measurement, so it varies. For a
    cut network it is the original's time multiplied by the fraction that remains, as
    `latency_profiler.measure_fraction_left` measures it with both networks interleaved."""
    agreement_fraction: float | None = None
    """Fraction of images for which the original network predicts the same; of labels or positions,
    if each image has several; of values R², see `OutputDivergence`. None for the original network,
    and where that is not known."""
    lost: int | None = None
    """Images, or labels, that the original network predicts correctly and this one does not."""
    gained: int | None = None
    """Images, or labels, that this network predicts correctly and the original one does not."""
    details: Mapping[str, float] = field(default_factory=dict)
    """Other figures that the metric computes, by name: such as those of each class."""
    latency_batch: int = LATENCY_BATCH
    """Images in the batch that was timed: fewer than usual if they take longer than
    `timing.LONGEST_PASS`."""
