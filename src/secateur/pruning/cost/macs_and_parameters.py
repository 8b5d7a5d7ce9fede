"""What a target is about: a number for any network that is cut from a dependency graph."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from secateur.config import Quantity
from secateur.errors import UsageError
from secateur.graph.dependency import DependencyGraph, Removed
from secateur.pruning.cost.latency_model import LatencyTable, milliseconds
from secateur.pruning.cost.memory import crowding, peak_bytes
from secateur.pruning.cost.tensor_sizes import Dimension, TensorSizes, dimensions_of

Measure = Callable[[Removed], float]
"""How much is left when some channels of each group go."""


def count_quantity(
    dependencies: DependencyGraph, quantity: Quantity, latency: LatencyTable | None = None
) -> Measure:
    """The function that gives a quantity of any network cut from `dependencies`, fast.

    `macs` and `memory` (bytes of activations alive at once) are for one image, `latency` is in
    milliseconds for the batch that `latency` was measured with. Raises `UsageError` where the
    latency is asked for without a table, or with one of another network.
    """
    if quantity == "macs":
        return _macs(dependencies)
    if quantity == "params":
        return _params(dependencies)
    if quantity == "filters":
        prunable = sum(len(group) for group in dependencies.groups.values())
        return lambda removed: prunable - sum(len(filters) for filters in removed.values())
    if quantity == "memory":
        return peak_bytes(dependencies)
    if latency is None:
        raise UsageError(
            "a target of latency needs times of the network's layers: pass "
            "latency=measure_latency(model, dependency graph, images)"
        )
    return milliseconds(latency, dependencies)


def crowding_of(dependencies: DependencyGraph, quantity: Quantity) -> Measure | None:
    """What to bring down step by step where the quantity itself need not move with each step."""
    return crowding(dependencies) if quantity == "memory" else None


def _macs(dependencies: DependencyGraph) -> Measure:
    """`DependencyGraph.macs` as a measure."""
    volumes = TensorSizes(
        dependencies,
        [
            (
                *dimensions_of(dependencies, layer.kernel, layer.shape),
                *(dependencies.channel_of[ids] for ids in layer.position_channels),
            )
            for layer in dependencies.layers
        ],
    )
    positions = np.array([layer.positions for layer in dependencies.layers], dtype=np.int64)
    return lambda removed: dependencies.product_macs + int((positions * volumes(removed)).sum())


def _params(dependencies: DependencyGraph) -> Measure:
    """`DependencyGraph.params` as a measure."""
    values: dict[str, list[Dimension]] = {
        name: list(dependencies.shapes[name]) for name in sorted(dependencies.parameters)
    }
    for slots in dependencies.slots:
        if slots.tensor in values:
            values[slots.tensor][slots.dim] = slots.channels
    volumes = TensorSizes(dependencies, values.values())
    return lambda removed: int(volumes(removed).sum())
