"""The channels of a network that a cut leaves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.fx.node import Node

from secateur.graph.channel_ids import Ids
from secateur.graph.dependency import DependencyGraph, Removed
from secateur.graph.network_graph import Sizes
from secateur.graph.residual_branches import ResidualBranch


class KeptChannels:
    """The channels of the original network's tensors that the cut network still has."""

    def __init__(
        self,
        dependencies: DependencyGraph,
        removed: Removed,
        dropped: Sequence[ResidualBranch] = (),
    ) -> None:
        self.dependencies: DependencyGraph = dependencies
        self.dropped: Sequence[ResidualBranch] = dropped
        """Residual branches that the cut network has constants in place of."""
        self.sizes: Sizes = dependencies.sizes_after(removed)
        self._stays = dependencies.kept_ids(dependencies.kept_channels(removed))

    def mask(self, node: Node, dim: int) -> Ids:
        """Return `[index]`: 1 for indices that stay along a dimension of a node's value."""
        ids = self.dependencies.axes[node][dim]
        size = int(node.meta["val"].shape[dim])
        return np.ones(size, np.int64) if ids is None else self._stays[ids].astype(np.int64)

    def select(self, node: Node, value: Tensor, except_dim: int | None = None) -> Tensor:
        """Return the part of the original's value that the cut network has as well.

        The dimension `except_dim` is left whole.
        """
        for dim, ids in enumerate(self.dependencies.axes[node]):
            if ids is not None and dim != except_dim and not self._stays[ids].all():
                index = torch.from_numpy(np.flatnonzero(self._stays[ids]))
                value = value.index_select(dim, index.to(value.device))
        return value

    def select_last(self, node: Node, rows: Tensor, dim: int) -> Tensor:
        """Return the part that the cut network has of rows whose last axis is the node's `dim`."""
        index = np.flatnonzero(self.mask(node, dim))
        return rows if len(index) == rows.shape[-1] else rows[..., torch.from_numpy(index)]
