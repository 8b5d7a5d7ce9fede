"""Metrics: how good a network is at its task, from its outputs for the test images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import nn

from secateur.data import Batch
from secateur.models.score import MetricUnit


@runtime_checkable
class Metric(Protocol):
    """Adds up, batch by batch, what a network's outputs are worth; higher is better."""

    @property
    def name(self) -> str:
        """What the main figure is called in tables: `mIoU`."""

    @property
    def unit(self) -> MetricUnit:
        """Unit of the main figure; with per cent `compute` returns a fraction."""

    def update(self, network: nn.Module, output: object, batch: Batch) -> None:
        """Add a batch: what the network returned for its images, on the network's device."""

    def merge(self) -> None:
        """Add up what all processes have; every one must call it, once."""

    def compute(self) -> dict[str, float]:
        """Return the figures by name, the main one first."""


MetricFactory = Callable[[], Metric]
"""Makes a metric that has seen nothing."""
