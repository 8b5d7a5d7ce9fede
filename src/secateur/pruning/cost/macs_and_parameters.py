"""Count the multiply-accumulates and parameters of a network from the channels it loses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from secateur.graph.dependency import DependencyGraph, Removed
from secateur.graph.tensor_sizes import Dimension, TensorSizes, dimensions_of


def count_macs(dependencies: DependencyGraph) -> Callable[[Removed], int]:
    """Return `DependencyGraph.macs` as a function that is fast to call many times."""
    sizes = TensorSizes(
        dependencies.groups,
        [
            (
                *dimensions_of(dependencies.channel_of, layer.kernel, layer.shape),
                *(dependencies.channel_of[ids] for ids in layer.position_channels),
            )
            for layer in dependencies.layers
        ],
    )
    positions = np.array([layer.positions for layer in dependencies.layers], dtype=np.int64)
    return lambda removed: dependencies.product_macs + int((positions * sizes(removed)).sum())


def count_params(dependencies: DependencyGraph) -> Callable[[Removed], int]:
    """Return `DependencyGraph.params` as a function that is fast to call many times."""
    values: dict[str, list[Dimension]] = {
        name: list(dependencies.shapes[name]) for name in sorted(dependencies.parameters)
    }
    for slots in dependencies.slots:
        if slots.tensor in values:
            values[slots.tensor][slots.dim] = slots.channels
    sizes = TensorSizes(dependencies.groups, values.values())
    return lambda removed: int(sizes(removed).sum())
