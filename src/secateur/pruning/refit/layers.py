"""A layer at one place where it is used, in the original and in the cut network."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor
from torch.fx.node import Node

from secateur.graph.channel_ids import Layer
from secateur.graph.interpreter import apply
from secateur.graph.kept_channels import KeptChannels
from secateur.graph.network_graph import argument, operation_name, position_of
from secateur.graph.patches import CONVOLUTIONS, Window, window_of
from secateur.pruning.refit.rows import at_positions


@dataclass(frozen=True, eq=False)
class RefitLayer:
    """A layer at one place where it is used."""

    layer: Layer
    kept: KeptChannels
    groups: int
    """Groups of the layer in the cut network."""
    window: Window | None
    """How its kernel moves; None if there are no patches to take."""

    @property
    def node(self) -> Node:
        """The operation."""
        return self.layer.node

    @property
    def source(self) -> Node:
        """The node that it reads."""
        source = self.node.args[0]
        assert isinstance(source, Node)
        return source

    @property
    def bias(self) -> str | None:
        """Name of its bias, if it has one."""
        source = self.node.args[2] if len(self.node.args) > 2 else None
        names = self.kept.dependencies.graph.tensor_names
        return names[source] if isinstance(source, Node) else None

    @property
    def is_linear(self) -> bool:
        """Whether channels lie along the last dimension, not along the one after the images."""
        return operation_name(self.node) == "linear"

    @property
    def is_transposed(self) -> bool:
        """Whether the inputs come first in its kernel."""
        return "transpose" in operation_name(self.node)

    @property
    def channel_dim(self) -> int:
        """Dimension of its input, and of its output, that channels lie along."""
        return len(self.source.meta["val"].shape) - 1 if self.is_linear else 1

    @property
    def rows_per_image(self) -> int:
        """How many rows of its input an image has: several frames of a film."""
        return int(self.source.meta["val"].shape[0]) // self.kept.dependencies.graph.images

    @property
    def has_patches(self) -> bool:
        """Whether the inputs that its kernel covers at a position can be extracted."""
        return self.is_linear or self.window is not None

    @functools.cached_property
    def positions(self) -> int:
        """Positions of its output in the cut network."""
        dims = range(1, len(self.node.meta["val"].shape))
        return math.prod(
            int(self.kept.mask(self.node, dim).sum()) for dim in dims if dim != self.channel_dim
        )

    def maps(self, value: Tensor) -> Float[Tensor, "image channel position"]:
        """Return an input or output with all other dimensions as positions."""
        return (
            value.movedim(self.channel_dim, 1).flatten(2) if value.dim() > 2 else value[..., None]
        )

    def patches(
        self,
        inputs: Float[Tensor, "image ..."],
        positions: Int[Tensor, "chosen position"],
        images: Int[Tensor, "chosen"],
    ) -> Float[Tensor, "group row value"]:
        """Return the inputs under each group's kernel, at positions of some images' outputs."""
        if self.window is None:
            rows = at_positions(self.maps(inputs[images]), positions)
        else:
            rows = self.window.patches(inputs, positions, images)
        taps = 1 if self.window is None else self.window.taps
        return (
            rows.reshape(-1, taps, self.groups, rows.shape[-1] // taps // self.groups)
            .movedim(2, 0)
            .flatten(2)
        )

    def output(
        self, inputs: Tensor, kernel: Tensor, state: Mapping[str, Tensor]
    ) -> Float[Tensor, "image channel position"]:
        """Return the output of the cut network's layer with another kernel."""

        def lookup(node: Node) -> Tensor:
            if node is self.source:
                return inputs
            if node is self.node.args[1]:
                return kernel
            return state[self.kept.dependencies.graph.tensor_names[node]]

        value: Tensor = apply(self.node, lookup, self.kept.sizes.get(self.node, {}))
        return self.maps(value)


def refit_layer(layer: Layer, kept: KeptChannels) -> RefitLayer:
    """Return a layer at the place of its node."""
    index = position_of(layer.node, "groups")
    groups = kept.sizes.get(layer.node, {}).get(index, argument(layer.node, "groups", 1))
    has_patches = operation_name(layer.node) in CONVOLUTIONS
    window = window_of(layer.node, layer.shape[2:]) if has_patches else None
    return RefitLayer(layer, kept, groups, window)
