"""Feed the consumers of a group with reconstructed channels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.fx.node import Node

from secateur.graph.channel_ids import Consumer
from secateur.graph.dependency import DependencyGraph
from secateur.graph.groups import Group
from secateur.graph.interpreter import apply
from secateur.graph.network_graph import Compute


def _first(output: Any) -> Tensor:
    """Return a layer's output, without the states that a recurrent layer returns behind it."""
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return first


@dataclass(frozen=True, eq=False)
class ChannelReconstruction:
    """Linear estimate of a group's channels from the kept ones: `matrix x + offset`."""

    matrix: Float[Tensor, "channel channel"]
    offset: Float[Tensor, "channel"]


class InputEdit:
    """Feeds one consumer of a group with reconstructed channels."""

    def __init__(self, dependencies: DependencyGraph, consumer: Consumer, group: Group) -> None:
        self.node: Node = consumer.node
        self.error: float = 0.0
        """Squared error of the consumer's last output: a sum over channels, a mean over rest."""
        self._dim = consumer.dim
        table = dependencies.index_table(group.channels)
        numbers = table[dependencies.channel_of[consumer.channels]]
        places = np.flatnonzero(numbers >= 0)
        # A channel that is read at several places, as after flattening, has several copies.
        order = places[np.argsort(numbers[places], kind="stable")]
        self._channels, copies = np.unique(numbers[places], return_counts=True)
        self._table = torch.from_numpy(order)
        is_even = bool(copies.size) and bool((copies == copies[0]).all())
        self._copies = int(copies[0]) if is_even else 0
        self._counts = torch.from_numpy(copies)
        self._number = torch.arange(len(copies)).repeat_interleave(self._counts)

    def reconstructed_inputs(self, snapshot: ChannelReconstruction) -> Compute:
        """Return the consumer's operation on reconstructed inputs; it also sets `error`."""

        def compute(lookup: Callable[[Node], Any]) -> Any:
            expected = apply(self.node, lookup, {})
            source = self.node.args[0]

            def reconstructed(node: Node) -> Any:
                value = lookup(node)
                return self._reconstructed(value, snapshot) if node is source else value

            output = apply(self.node, reconstructed, {})
            error = (_first(output) - _first(expected)).square()
            self.error = float(error.mean()) * error.shape[1 if error.dim() > 2 else -1]
            return output

        return compute

    def _reconstructed(self, value: Tensor, snapshot: ChannelReconstruction) -> Tensor:
        """Return the value with reconstructions in place of the removed channels.

        Only channels that this consumer reads serve to reconstruct others.
        """
        channels = torch.from_numpy(self._channels)
        matrix = snapshot.matrix[channels][:, channels].to(value)
        offset, table = snapshot.offset[channels].to(value), self._table.to(value.device)
        result = value.movedim(self._dim, -1).clone()
        originals = result[..., table]
        if self._copies:
            by_copy = originals.unflatten(-1, (len(channels), self._copies))
            estimates = torch.einsum("...nc,mn->...mc", by_copy, matrix) + offset[:, None]
            result[..., table] = estimates.flatten(-2)
        else:  # some channels have more copies than others
            number, counts = self._number.to(value.device), self._counts.to(value)
            means = originals.new_zeros(*originals.shape[:-1], len(channels))
            means = means.index_add(-1, number, originals) / counts
            estimates = (means @ matrix.mT + offset)[..., number]
            stays = matrix.diagonal()[number] == 1
            result[..., table] = torch.where(stays, originals, estimates)
        return result.movedim(-1, self._dim)
