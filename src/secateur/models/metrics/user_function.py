"""A metric of the user's: a function of the network that returns a number."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real

import torch
from torch import nn

from secateur.data import Batch
from secateur.graph.forward import without_forward
from secateur.graph.module_state import evaluating
from secateur.models.score import MetricUnit
from secateur.runtime import distributed
from secateur.runtime.errors import UsageError

NetworkFunction = Callable[[nn.Module], float]
"""Returns how good a network is: higher is better."""


class UserMetric:
    """What a function of the network returns, on data of its own.

    It is called once for each score, with the network in evaluation mode; in several processes on
    the main one.
    """

    unit: MetricUnit = ""

    def __init__(self, function: NetworkFunction, name: str = "") -> None:
        if not callable(function):
            raise UsageError(
                "metric must be a function of the network that returns a number, not "
                f"{function!r}: metric=lambda network: accuracy(network, my_loader)"
            )
        self.name: str = name or getattr(function, "__name__", type(function).__name__)
        self._function = function
        self._network: nn.Module | None = None

    def update(self, network: nn.Module, output: object, batch: Batch) -> None:
        """Note the network; see `Metric.update`."""
        del output, batch
        self._network = network

    def merge(self) -> None:
        """Do nothing: the function sees the whole network."""

    def compute(self) -> dict[str, float]:
        """Return the number; raises `UsageError` if the function returns anything else."""
        return {self.name: distributed.on_main_process(self._measure)}

    def _measure(self) -> float:
        assert self._network is not None
        network = without_forward(self._network)  # as the user knows it
        with evaluating(network), torch.no_grad():
            try:
                value = self._function(network)
            except Exception as error:  # user code may raise anything
                reason = " ".join(str(error).split())
                raise UsageError(
                    f"metric {self.name} failed: {type(error).__name__}: {reason}"
                ) from error
        number = value.item() if hasattr(value, "item") else value
        if not isinstance(number, Real) or not math.isfinite(number):
            raise UsageError(f"metric {self.name} must return a finite number, not {value!r}")
        return float(number)
