"""Scores of networks, as a run folder keeps them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MetricUnit = Literal["%", "dB", ""]
"""Unit of a metric; a metric in per cent is kept as a fraction."""


@dataclass(frozen=True)
class OutputDivergence:
    """How far a network's outputs are from the expected ones."""

    divergence: float
    """Mean KL divergence from the expected outputs, KL(expected ‖ actual), in nats; for softened
    outputs multiplied by the square of the temperature."""
    top1_fraction: float
    """Fraction of images for which both predict the same class; of labels, if each image has
    several."""


@dataclass(frozen=True)
class Score:
    """A network's accuracy and cost."""

    top1_fraction: float
    """Fraction of images whose class is predicted; of labels, if each image has several."""
    top5_fraction: float | None
    """None with five classes or fewer, and with several labels for each image."""
    loss: float
    """Mean cross-entropy in nats."""
    images: int
    """Number of images that were scored."""
    macs: int
    """Multiply-accumulates for one image."""
    parameters: int
    latency_ms: float
    """Median time of a forward pass of `LATENCY_BATCH` images; a measurement, so it varies. For a
    cut network it is the original's time multiplied by the fraction that remains, as
    `latency_profiler.measure_fraction_left` measures it with both networks interleaved."""
    agreement_fraction: float | None = None
    """Fraction of images for which the original network predicts the same; of labels, if each image
    has several. None for the original network, and where that is not known."""
    lost: int | None = None
    """Images, or labels, that the original network predicts correctly and this one does not."""
    gained: int | None = None
    """Images, or labels, that this network predicts correctly and the original one does not."""
