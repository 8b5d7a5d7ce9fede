"""What a target is about: a number for any network that is cut from a wiring."""

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
    wiring: DependencyGraph, quantity: Quantity, latency: LatencyTable | None = None
) -> Measure:
    """The function that gives a quantity of any network cut from `wiring`, fast.

    `macs` and `memory` (bytes of activations alive at once) are for one image, `latency` is in
    milliseconds for the batch that `latency` was measured with. Raises `UsageError` where the
    latency is asked for without a table, or with one of another network.
    """
    if quantity == "macs":
        return _macs(wiring)
    if quantity == "params":
        return _params(wiring)
    if quantity == "filters":
        prunable = sum(len(group) for group in wiring.groups.values())
        return lambda removed: prunable - sum(len(filters) for filters in removed.values())
    if quantity == "memory":
        return peak_bytes(wiring)
    if latency is None:
        raise UsageError(
            "a target of latency needs times of the network's layers: pass "
            "latency=measure_latency(model, wiring, images)"
        )
    return milliseconds(latency, wiring)


def crowding_of(wiring: DependencyGraph, quantity: Quantity) -> Measure | None:
    """What to bring down step by step where the quantity itself need not move with each step."""
    return crowding(wiring) if quantity == "memory" else None


def _macs(wiring: DependencyGraph) -> Measure:
    """`Wiring.macs` as a measure."""
    volumes = TensorSizes(
        wiring,
        [
            (
                *dimensions_of(wiring, layer.kernel, layer.shape),
                *(wiring.channel_of[ids] for ids in layer.over),
            )
            for layer in wiring.layers
        ],
    )
    positions = np.array([layer.positions for layer in wiring.layers], dtype=np.int64)
    return lambda removed: wiring.product_macs + int((positions * volumes(removed)).sum())


def _params(wiring: DependencyGraph) -> Measure:
    """`Wiring.params` as a measure."""
    values: dict[str, list[Dimension]] = {
        name: list(wiring.shapes[name]) for name in sorted(wiring.parameters)
    }
    for slots in wiring.slots:
        if slots.tensor in values:
            values[slots.tensor][slots.dim] = slots.channels
    volumes = TensorSizes(wiring, values.values())
    return lambda removed: int(volumes(removed).sum())
