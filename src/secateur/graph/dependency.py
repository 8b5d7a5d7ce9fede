"""The dependency graph: which channels must be cut together, what is frozen, and what a cut leaves.

Channels that are coupled form a group and can only be cut as one. A channel that reaches an
operation without a rule, a size written in the user's code, or the network's input or output is
frozen, with the reason (`DependencyGraph.frozen`); its coupling is never guessed. The term is from
Fang et al., *DepGraph: Towards Any Structural Pruning* (CVPR 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import nn
from torch.fx.node import Node

from secateur.graph.channel_ids import Axes, Consumer, Count, Ids, Layer, Resize, index_table
from secateur.graph.groups import FrozenGroup, Group
from secateur.graph.network_graph import NetworkGraph, Sizes
from secateur.graph.weight_norm import WeightNorm
from secateur.runtime.hashing import architecture_hash

NOT_PRUNABLE = -1
OUTPUT = "written to the network's output"
RESIDUAL = "coupled by skip connections over a whole stage (prune_residual is off)"
Removed = Mapping[str, tuple[int, ...]]
"""Group -> numbers of the channels to remove from it."""


@dataclass(frozen=True, eq=False)
class Slots:
    """The channel that each index of one dimension of a parameter or buffer belongs to."""

    tensor: str
    dim: int
    channels: Ids
    """`[index]`: prunable channel id, or -1 if the index must stay."""


@dataclass(frozen=True, eq=False)
class SizedAttribute:
    """A number in a module that is a number of channels, so that a cut changes it."""

    module: str
    name: str
    index: int | None
    """Index in the attribute, if that is a tuple or list."""
    size: Callable[[Count], int]


@dataclass(frozen=True, eq=False)
class DependencyGraph:
    """All that is needed to cut channels out of a network, and to count what a cut leaves."""

    graph: NetworkGraph
    groups: dict[str, Group]
    frozen: tuple[FrozenGroup, ...]
    slots: tuple[Slots, ...]
    layers: tuple[Layer, ...]
    consumers: tuple[Consumer, ...]
    covers: tuple[Ids, ...]
    """Channels along one dimension of some value: at least one of each must stay."""
    attributes: tuple[SizedAttribute, ...]
    axes: Mapping[Node, Axes]
    """Ids along each dimension of every value."""
    multi_output_axes: Mapping[Node, list[Axes]]
    """The same for operations that have several values."""
    mixing: frozenset[Node]
    """Operations over all channels, such as layer norm, whose values change if some go."""
    channel_of: Ids
    """`[id]`: the prunable channel of an id, or -1."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of every parameter and buffer."""
    parameters: frozenset[str]
    """Names that count as parameters: not buffers, and shared ones once."""
    product_macs: int
    """Multiply-accumulates per image in products of feature maps (attention), never cut."""
    resizes: Mapping[Node, Resize]
    """Operations whose arguments hold numbers of channels."""
    weight_norms: tuple[WeightNorm, ...]
    """Kernels with weight norm, each as often as it is computed."""

    @property
    def architecture(self) -> str:
        """Hash of the names and shapes of all parameters and buffers."""
        return architecture_hash(self.shapes)

    def kept_channels(self, removed: Removed) -> npt.NDArray[np.bool_]:
        """Return `[channel id]`: whether a channel stays after a cut."""
        kept = np.ones(len(self.channel_of), dtype=bool)
        for name, numbers in removed.items():
            kept[self.groups[name].channels[list(numbers)]] = False
        return kept

    def kept_ids(self, kept_channels: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Return `[id]`: whether an id stays, for the channels that stay, `[channel id]`."""
        kept: npt.NDArray[np.bool_] = kept_channels[self.channel_of]
        kept[self.channel_of == NOT_PRUNABLE] = True
        return kept

    def count_kept(self, kept_channels: npt.NDArray[np.bool_]) -> Count:
        """Return the function that counts ids of the channels that stay, `[channel id]`."""
        kept = self.kept_ids(kept_channels)
        return lambda ids, size: size if ids is None else int(np.count_nonzero(kept[ids]))

    def count_after(self, removed: Removed) -> Count:
        """Return the function that counts the ids that stay after a cut."""
        return self.count_kept(self.kept_channels(removed))

    def index_table(self, channels: Ids) -> Ids:
        """Return `[id]`: the index of each channel in `channels`, or -1; its last entry is -1.

        So a table may be indexed by `channel_of`, whose -1 gives -1 again.
        """
        return index_table(channels, len(self.channel_of))

    def kept_indices(self, removed: Removed) -> dict[str, dict[int, npt.NDArray[np.int64]]]:
        """Return `{tensor: {dimension: indices that stay}}` for every tensor that a cut shrinks."""
        kept_channels = self.kept_channels(removed)
        indices: dict[str, dict[int, npt.NDArray[np.int64]]] = {}
        for slots in self.slots:
            kept = (slots.channels == NOT_PRUNABLE) | kept_channels[slots.channels]
            if not kept.all():
                indices.setdefault(slots.tensor, {})[slots.dim] = np.flatnonzero(kept)
        return indices

    def shapes_after(self, removed: Removed) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter and buffer after a cut."""
        shapes = dict(self.shapes)
        for tensor, dims in self.kept_indices(removed).items():
            shape = list(shapes[tensor])
            for dim, indices in dims.items():
                shape[dim] = len(indices)
            shapes[tensor] = tuple(shape)
        return shapes

    def sizes_after(self, removed: Removed) -> Sizes:
        """Return the arguments of the graph's operations that hold sizes, after a cut."""
        count = self.count_after(removed)
        return {node: resize(count) for node, resize in self.resizes.items()}

    def macs(self, removed: Removed | None = None) -> int:
        """Return the multiply-accumulates per image, in layers and in products of feature maps."""
        count = self.count_after(removed or {})
        return self.product_macs + sum(layer.macs(count) for layer in self.layers)

    def params(self, removed: Removed | None = None) -> int:
        """Return the number of parameters, shared ones counted once."""
        shapes = self.shapes_after(removed or {})
        return sum(math.prod(shapes[name]) for name in self.parameters)


def aliases_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return `{name: every name of the same parameter or buffer, its own included}`."""
    named = model.named_parameters(remove_duplicate=False)
    buffers = model.named_buffers(remove_duplicate=False)
    by_identity: dict[int, list[str]] = {}
    for name, tensor in [*named, *buffers]:
        by_identity.setdefault(id(tensor), []).append(name)
    return {name: tuple(names) for names in by_identity.values() for name in names}
