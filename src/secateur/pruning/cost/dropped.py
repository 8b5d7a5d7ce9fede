"""What residual branches save that are dropped, in networks that also lose channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from secateur.config import Quantity
from secateur.graph.activation_memory import storages
from secateur.graph.channel_ids import Layer
from secateur.graph.dependency import DependencyGraph, Removed
from secateur.graph.residual_branches import ResidualBranch
from secateur.graph.tensor_sizes import Dimension, TensorSizes, dimensions_of
from secateur.pruning.cost.latency_model import LatencyTable, layers_ms
from secateur.runtime.errors import UsageError

Savings = npt.NDArray[np.float64]


def dropped_savings(
    dependencies: DependencyGraph,
    branches: Sequence[ResidualBranch],
    quantity: Quantity,
    latency: LatencyTable | None = None,
) -> Callable[[Removed], Savings]:
    """Return a function of the removed channels: what each branch costs beyond its constant.

    The units are those of `count_quantity`. Raises `UsageError` if the quantity is neither `macs`,
    `params` nor `latency`.
    """
    if quantity == "macs":
        return _macs(dependencies, branches)
    if quantity == "params":
        return _params(dependencies, branches)
    if quantity != "latency" or latency is None:
        raise UsageError(
            f"the action depth plans by macs, params or latency, not by {quantity}: set such a "
            "target, or leave depth out of the actions"
        )
    return _milliseconds(dependencies, branches, latency)


def _macs(
    dependencies: DependencyGraph, branches: Sequence[ResidualBranch]
) -> Callable[[Removed], Savings]:
    inside = _layers_inside(dependencies, branches)
    layers = [layer for part in inside for layer in part]
    sizes = TensorSizes(
        dependencies.groups,
        [
            (
                *dimensions_of(dependencies.channel_of, layer.kernel, layer.shape),
                *(dependencies.channel_of[ids] for ids in layer.position_channels),
            )
            for layer in layers
        ],
    )
    positions = np.array([layer.positions for layer in layers], dtype=np.int64)
    return _summed([len(part) for part in inside], lambda removed: positions * sizes(removed))


def _params(
    dependencies: DependencyGraph, branches: Sequence[ResidualBranch]
) -> Callable[[Removed], Savings]:
    slots = {(part.tensor, part.dim): part.channels for part in dependencies.slots}

    def dimensions(name: str) -> tuple[Dimension, ...]:
        sizes = enumerate(dependencies.shapes[name])
        return tuple(slots.get((name, dim), size) for dim, size in sizes)

    inside = [sorted(branch.tensors & dependencies.parameters) for branch in branches]
    sizes = TensorSizes(dependencies.groups, [dimensions(name) for part in inside for name in part])
    constants = TensorSizes(
        dependencies.groups, [(dependencies.channel_of[branch.channels],) for branch in branches]
    )
    total = _summed([len(part) for part in inside], sizes)
    return lambda removed: total(removed) - constants(removed)


def _milliseconds(
    dependencies: DependencyGraph, branches: Sequence[ResidualBranch], table: LatencyTable
) -> Callable[[Removed], Savings]:
    ms = layers_ms(dependencies, table.layers, table.block)
    inside = _layers_inside(dependencies, branches)
    number = {layer.node: index for index, layer in enumerate(dependencies.layers)}
    order = [number[layer.node] for part in inside for layer in part]
    layers = _summed([len(part) for part in inside], lambda removed: ms(removed)[order])
    written = [
        [
            storage
            for storage in storages(dependencies)
            if storage.node in branch.nodes
            and storage.node not in number
            and storage.node is not branch.end
        ]
        for branch in branches
    ]
    flat = [storage for part in written for storage in part]
    sizes = TensorSizes(dependencies.groups, [storage.dimensions for storage in flat])
    images = np.array([storage.images for storage in flat], dtype=np.int64)
    values = _summed([len(part) for part in written], lambda removed: sizes(removed) // images)
    return lambda removed: (
        table.layers_factor * layers(removed) + table.ms_per_value * values(removed)
    )


def _layers_inside(
    dependencies: DependencyGraph, branches: Sequence[ResidualBranch]
) -> list[list[Layer]]:
    return [
        [layer for layer in dependencies.layers if layer.node in branch.nodes]
        for branch in branches
    ]


def _summed(
    counts: Sequence[int], parts: Callable[[Removed], npt.NDArray[np.generic]]
) -> Callable[[Removed], Savings]:
    """Return the sums of consecutive parts, so many at a time."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return lambda removed: np.bincount(owner, parts(removed), len(counts)).astype(np.float64)
