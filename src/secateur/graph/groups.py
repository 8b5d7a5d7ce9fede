"""From channel ids to groups: channels of one width that are chosen together."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx.node import Node

from secateur.graph.channel_ids import Consumer, Ids, Layer


@dataclass(frozen=True, eq=False)
class Tap:
    """Where feature maps of a group are looked at: what a reader reads, before any flattening."""

    node: Node
    dim: int
    """Dimension of the node's value that channels lie along."""
    index: Ids
    """`[filter]`: the places along that dimension that belong to the group."""
    channel: Ids
    """`[filter]`: number of each one's channel in the group."""


@dataclass(frozen=True, eq=False)
class Group:
    """Channels of one width that are chosen together.

    A channel is what must be cut at once: mostly filter `i` of `name`, or several filters where
    grouped convolutions, shuffles or reshapes tie them.
    """

    name: str
    """The layer that writes the channels, the first one where several are tied."""
    channels: Ids
    layers: tuple[Layer, ...]
    """Layers that write the channels."""
    consumers: tuple[Consumer, ...]
    taps: tuple[Tap, ...]

    def __len__(self) -> int:
        return len(self.channels)


@dataclass(frozen=True)
class FrozenGroup:
    """Filters of a layer, and of those tied to it, that can't be cut, and the reason."""

    name: str
    size: int
    reason: str
