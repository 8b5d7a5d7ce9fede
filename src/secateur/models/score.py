"""Scores of networks, as a run folder keeps them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OutputDivergence:
    """How far a network's outputs are from the expected ones."""

    divergence: float
    """Mean KL divergence from the expected outputs, KL(expected ‖ actual), in nats; for softened
    outputs multiplied by the square of the temperature."""
    top1_fraction: float
    """Fraction of images for which both predict the same class."""


@dataclass(frozen=True)
class Score:
    """A network's accuracy and cost."""

    top1_fraction: float
    top5_fraction: float
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
