"""Layers as readers of values that have lost channels, in the original and in the cut network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.fx.node import Node

from secateur.graph.channel_ids import Ids, Layer
from secateur.graph.dependency import DependencyGraph, Removed
from secateur.graph.interpreter import apply
from secateur.graph.network_graph import Sizes, argument, operation_name, position_of
from secateur.graph.patches import CONVOLUTIONS, Window, window_of


class KeptChannels:
    """What a plan leaves of the values in the original network."""

    def __init__(self, dependencies: DependencyGraph, removed: Removed) -> None:
        self.dependencies: DependencyGraph = dependencies
        self.sizes: Sizes = dependencies.sizes_after(removed)
        self._stays = dependencies.kept_ids(removed)

    def mask(self, node: Node, dim: int) -> Ids:
        """`[index]`: 1 where it stays, along a dimension of a node's value."""
        ids = self.dependencies.axes[node][dim]
        size = int(node.meta["val"].shape[dim])
        return np.ones(size, np.int64) if ids is None else self._stays[ids].astype(np.int64)

    def of(self, node: Node, value: Tensor, but: int | None = None) -> Tensor:
        """The part of the original's value that the cut network has as well.

        Along the dimension `but` it is left whole.
        """
        for dim, ids in enumerate(self.dependencies.axes[node]):
            if ids is not None and dim != but and not self._stays[ids].all():
                index = torch.from_numpy(np.flatnonzero(self._stays[ids]))
                value = value.index_select(dim, index.to(value.device))
        return value


@dataclass(frozen=True, eq=False)
class RefitLayer:
    """A layer at a place where it is used."""

    layer: Layer
    remains: KeptChannels
    groups: int
    """Groups of the layer in the cut network."""
    window: Window | None
    """How its kernel moves; None where there are no patches to take."""

    @property
    def node(self) -> Node:
        """The operation."""
        return self.layer.node

    @property
    def source(self) -> Node:
        """What it reads."""
        source = self.node.args[0]
        assert isinstance(source, Node)
        return source

    @property
    def is_linear(self) -> bool:
        """Whether channels lie along the last dimension, not along the first after the images."""
        return operation_name(self.node) == "linear"

    @property
    def is_transposed(self) -> bool:
        """Whether its kernel has the inputs first."""
        return "transpose" in operation_name(self.node)

    @property
    def channel_dim(self) -> int:
        """Dimension of what it reads, and of what it answers, that channels lie along."""
        return len(self.source.meta["val"].shape) - 1 if self.is_linear else 1

    @property
    def has_patches(self) -> bool:
        """Whether what its kernel meets can be taken."""
        return self.is_linear or self.window is not None

    @property
    def positions(self) -> int:
        """Positions of what it answers, in the cut network."""
        dims = range(1, len(self.node.meta["val"].shape))
        return math.prod(
            int(self.remains.mask(self.node, dim).sum()) for dim in dims if dim != self.channel_dim
        )

    def maps(self, value: Tensor) -> Float[Tensor, "image channel position"]:
        """A value that it reads or answers, with all other dimensions as positions."""
        return (
            value.movedim(self.channel_dim, 1).flatten(2) if value.dim() > 2 else value[..., None]
        )

    def patches(
        self, inputs: Float[Tensor, "image ..."], chosen: Int[Tensor, "image position"]
    ) -> Float[Tensor, "group row value"]:
        """What each group's kernel meets in the cut network, at chosen positions of the answer."""
        if self.window is None:
            rows = at(self.maps(inputs), chosen)
        else:
            rows = self.window.patches(inputs, chosen)
        taps = 1 if self.window is None else self.window.taps
        return (
            rows.reshape(-1, taps, self.groups, rows.shape[-1] // taps // self.groups)
            .movedim(2, 0)
            .flatten(2)
        )

    def output(
        self, inputs: Tensor, kernel: Tensor, state: Mapping[str, Tensor]
    ) -> Float[Tensor, "image channel position"]:
        """What the cut network's layer answers with another kernel."""

        def lookup(node: Node) -> Tensor:
            if node is self.source:
                return inputs
            if node is self.node.args[1]:
                return kernel
            return state[self.remains.dependencies.graph.tensor_names[node]]

        value: Tensor = apply(self.node, lookup, self.remains.sizes.get(self.node, {}))
        return self.maps(value)


def refit_layer(layer: Layer, remains: KeptChannels) -> RefitLayer:
    """The layer at the place where its node is."""
    index = position_of(layer.node, "groups")
    groups = remains.sizes.get(layer.node, {}).get(index, argument(layer.node, "groups", 1))
    has_patches = operation_name(layer.node) in CONVOLUTIONS
    window = window_of(layer.node, layer.shape[2:]) if has_patches else None
    return RefitLayer(layer, remains, groups, window)


def at(
    maps: Float[Tensor, "image channel position"], chosen: Int[Tensor, "image chosen"]
) -> Float[Tensor, "image chosen channel"]:
    """Maps at some positions of each image."""
    index = chosen.to(maps.device)[:, None].expand(-1, maps.shape[1], -1)
    return maps.gather(2, index).movedim(1, -1)


def by_group(
    rows: Float[Tensor, "image position channel"], groups: int
) -> Float[Tensor, "group row value"]:
    """Rows of channels, parted into groups that lie behind each other."""
    return rows.reshape(-1, groups, rows.shape[-1] // groups).movedim(1, 0)
