"""The quantities that a budget can limit, each as a function of the channels to remove."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from secateur.config import Quantity
from secateur.graph.activation_memory import alive_bytes, count_other_values, peak_bytes
from secateur.graph.dependency import DependencyGraph, Removed
from secateur.pruning.cost.latency_model import LatencyTable, predict_milliseconds
from secateur.pruning.cost.macs_and_parameters import count_macs, count_params
from secateur.runtime.errors import UsageError

Measure = Callable[[Removed], float]
"""Gives the quantity of a network without some channels of each group."""


def count_quantity(
    dependencies: DependencyGraph, quantity: Quantity, latency: LatencyTable | None = None
) -> Measure:
    """Return a fast function that gives a quantity of any network cut from `dependencies`.

    `macs` and `memory` (peak bytes of activations) are for one image; `latency` is in milliseconds
    for the batch that the table was measured with. Raises `UsageError` if latency is asked for
    without a table, or with the table of another network.
    """
    if quantity == "macs":
        return count_macs(dependencies)
    if quantity == "params":
        return count_params(dependencies)
    if quantity == "filters":
        prunable = sum(len(group) for group in dependencies.groups.values())
        return lambda removed: prunable - sum(len(filters) for filters in removed.values())
    if quantity == "memory":
        return peak_bytes(dependencies)
    if latency is None:
        raise UsageError(
            "a target of latency needs times of the network's layers: pass "
            "latency=measure_latency(model, dependencies, images)"
        )
    return predict_milliseconds(latency, dependencies, count_other_values(dependencies))


def crowding_of(dependencies: DependencyGraph, quantity: Quantity) -> Measure | None:
    """Return a smooth proxy for a quantity that need not fall with every step; None if it does."""
    return crowding(dependencies) if quantity == "memory" else None


CROWDING_NORM = 16
"""Order of the norm that stands for the maximum in `crowding`."""


def crowding(dependencies: DependencyGraph) -> Callable[[Removed], float]:
    """Return a smooth proxy for `peak_bytes`: a `CROWDING_NORM`-norm of the live bytes over time.

    If several layers reach the peak, shrinking one of them lowers this norm but not the peak.
    """
    alive = alive_bytes(dependencies)
    return lambda removed: float(np.linalg.norm(alive(removed), CROWDING_NORM))
