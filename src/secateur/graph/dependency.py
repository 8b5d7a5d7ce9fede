"""Which channels of a network live and die together.

Every dimension of every parameter gets channel ids. The ids ride along the tensors of the traced
graph: activations, norms and pooling keep them, concatenation joins them, splitting parts them,
flattening repeats them, addition and convolution tie them. Ids that end up tied are one channel. A
channel that meets an operation without a rule, a size baked into the user's code, or the network's
input or output is frozen, and says why; it is never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import nn
from torch.fx.node import Node

from secateur.graph.channel_ids import Axes, Consumer, Count, Ids, Layer, Resize
from secateur.graph.groups import FrozenGroup, Group
from secateur.graph.network_graph import NetworkGraph, Sizes

NOT_PRUNABLE = -1
RESIDUAL = "tied over a whole stage by residual sums (prune_residual is off)"
Removed = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Slots:
    """Which channel each index of one dimension of a parameter or buffer belongs to."""

    tensor: str
    dim: int
    channels: Ids
    """`[index]`: prunable channel id, or -1 where the index must stay."""


@dataclass(frozen=True, eq=False)
class SizedAttribute:
    """A number in a module that is a number of channels, so that it changes with a cut."""

    module: str
    name: str
    index: int | None
    """Place in the attribute, where that is a tuple or list."""
    size: Callable[[Count], int]


@dataclass(frozen=True, eq=False)
class DependencyGraph:
    """All that is needed to cut channels out of a network."""

    graph: NetworkGraph
    groups: dict[str, Group]
    frozen: tuple[FrozenGroup, ...]
    slots: tuple[Slots, ...]
    layers: tuple[Layer, ...]
    consumers: tuple[Consumer, ...]
    covers: tuple[Ids, ...]
    """Channels along one dimension of some value: of each at least one must stay."""
    attributes: tuple[SizedAttribute, ...]
    axes: Mapping[Node, Axes]
    """Ids along each dimension of every value."""
    several: Mapping[Node, list[Axes]]
    """The same for operations that have several values."""
    mixing: frozenset[Node]
    """Operations over all channels, such as layer norm, which fewer channels change."""
    channel_of: Ids
    """`[id]`: the prunable channel of an id, or -1."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of every parameter and buffer."""
    parameters: frozenset[str]
    """Names that count as parameters: not buffers, shared ones once."""
    product_macs: int
    """Multiply-accumulates of an image in products of feature maps (attention), never cut."""
    resizes: Mapping[Node, Resize]

    def channels_kept(self, removed: Removed) -> npt.NDArray[np.bool_]:
        """`[channel id]`: whether a channel stays when `removed` channels of each group go."""
        kept = np.ones(len(self.channel_of), dtype=bool)
        for name, indices in removed.items():
            kept[self.groups[name].channels[list(indices)]] = False
        return kept

    def count_after(self, removed: Removed) -> Count:
        """How many of some channel ids are left when `removed` channels of each group go."""
        stays = self.is_kept(removed)
        return lambda ids, size: size if ids is None else int(np.count_nonzero(stays[ids]))

    def is_kept(self, removed: Removed) -> npt.NDArray[np.bool_]:
        """`[id]`: whether it stays when `removed` channels of each group go."""
        result: npt.NDArray[np.bool_] = self.channels_kept(removed)[self.channel_of]
        result[self.channel_of == NOT_PRUNABLE] = True
        return result

    def kept_indices(self, removed: Removed) -> dict[str, dict[int, npt.NDArray[np.int64]]]:
        """`{tensor: {dimension: indices that stay}}` for every tensor that loses something."""
        kept = self.channels_kept(removed)
        result: dict[str, dict[int, npt.NDArray[np.int64]]] = {}
        for slots in self.slots:
            stays = (slots.channels == NOT_PRUNABLE) | kept[slots.channels]
            if not stays.all():
                result.setdefault(slots.tensor, {})[slots.dim] = np.flatnonzero(stays)
        return result

    def shapes_after(self, removed: Removed) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter and buffer when `removed` channels of each group go."""
        shapes = dict(self.shapes)
        for tensor, dims in self.kept_indices(removed).items():
            shape = list(shapes[tensor])
            for dim, indices in dims.items():
                shape[dim] = len(indices)
            shapes[tensor] = tuple(shape)
        return shapes

    def sizes_after(self, removed: Removed) -> Sizes:
        """Arguments of the graph's operations when `removed` channels of each group go."""
        count = self.count_after(removed)
        return {node: resize(count) for node, resize in self.resizes.items()}

    def macs(self, removed: Removed | None = None) -> int:
        """Multiply-accumulates for one image, in layers and in products of feature maps."""
        count = self.count_after(removed or {})
        return self.product_macs + sum(layer.macs(count) for layer in self.layers)

    def params(self, removed: Removed | None = None) -> int:
        """Number of parameters, shared ones counted once."""
        shapes = self.shapes_after(removed or {})
        return sum(math.prod(shapes[name]) for name in self.parameters)


def aliases_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """`{name: every name of the same parameter or buffer, its own included}`."""
    named = model.named_parameters(remove_duplicate=False)
    buffers = model.named_buffers(remove_duplicate=False)
    by_identity: dict[int, list[str]] = {}
    for name, tensor in [*named, *buffers]:
        by_identity.setdefault(id(tensor), []).append(name)
    return {name: tuple(names) for names in by_identity.values() for name in names}
