"""What convolutions save that are replaced by two, in networks that also lose channels."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from secateur.config import Quantity
from secateur.graph.dependency import DependencyGraph, Removed
from secateur.graph.factorisation import FactorableLayer, Ranks
from secateur.graph.tensor_sizes import TensorSizes, dimensions_of
from secateur.runtime.errors import UsageError

Costs = npt.NDArray[np.int64]


class FactoredCost:
    """Multiply-accumulates, or parameters, that some ranks save, for any channels removed."""

    def __init__(
        self,
        dependencies: DependencyGraph,
        layers: Mapping[str, FactorableLayer],
        quantity: Quantity,
    ) -> None:
        """Raise `UsageError` if the quantity is neither `macs` nor `params`."""
        if quantity not in ("macs", "params"):
            raise UsageError(
                f"the action rank plans by macs or params, not by {quantity}: set such a target, "
                "or leave rank out of the actions"
            )
        self._names = list(layers)
        dims = [
            dimensions_of(dependencies.channel_of, layer.layer.kernel, layer.layer.shape)
            for layer in layers.values()
        ]
        self._outputs = TensorSizes(dependencies.groups, [kernel[:1] for kernel in dims])
        self._inputs = TensorSizes(dependencies.groups, [kernel[1:2] for kernel in dims])
        by_macs = quantity == "macs"
        positions = [layer.layer.positions if by_macs else 1 for layer in layers.values()]
        first = [layer.first_positions if by_macs else 1 for layer in layers.values()]
        self._taps = np.array(
            [int(np.prod(layer.layer.shape[2:])) for layer in layers.values()], dtype=np.int64
        ) * np.array(positions, dtype=np.int64)
        self._first = np.array(
            [n * layer.first_values(1) for n, layer in zip(first, layers.values(), strict=True)],
            dtype=np.int64,
        )
        self._second = np.array(
            [
                n * layer.second_values(1)
                for n, layer in zip(positions, layers.values(), strict=True)
            ],
            dtype=np.int64,
        )

    def savings(self, ranks: Ranks, removed: Removed) -> Costs:
        """Return `[layer]`: what each layer saves by its rank; 0 without one, never less."""
        outputs, inputs = self._outputs(removed), self._inputs(removed)
        rank = np.array([ranks.get(name, -1) for name in self._names], dtype=np.int64)
        whole = self._taps * outputs * inputs
        factored = rank * (self._first * inputs + self._second * outputs)
        return np.where(rank < 0, 0, np.maximum(0, whole - factored))
