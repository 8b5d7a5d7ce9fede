"""Groups: channels that can only be cut together, and those that are frozen, with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch.fx.node import Node

from secateur.graph.channel_ids import Consumer, Ids, Layer


@dataclass(frozen=True, eq=False)
class Tap:
    """Where a group's feature maps are observed: the input of a consumer, before any flattening."""

    node: Node
    dim: int
    """Dimension of the node's value that channels lie along."""
    index: Ids
    """`[filter]`: indices along that dimension that belong to the group."""
    channel: Ids
    """`[filter]`: number of each one's channel in the group."""


@dataclass(frozen=True, eq=False)
class Group:
    """Channels of the same width that are ranked and cut together.

    A channel is the smallest unit that can be cut: mostly filter `i` of the layer `name`, or
    several filters if grouped convolutions, shuffles or reshapes couple them.
    """

    name: str
    """The layer that produces the channels, the first one if several do."""
    channels: Ids
    layers: tuple[Layer, ...]
    """Layers that produce the channels."""
    consumers: tuple[Consumer, ...]
    taps: tuple[Tap, ...]

    def __len__(self) -> int:
        return len(self.channels)


class Reason(NamedTuple):
    """Why channels can't be cut."""

    cause: str
    place: str = ""
    """The operation that is the cause, and where it is called: `add() at net.py:12`."""

    def __str__(self) -> str:
        """Return the cause and the place."""
        return f"{self.cause}, in {self.place}" if self.place else self.cause


@dataclass(frozen=True)
class FrozenGroup:
    """Filters of a layer, and of layers coupled to it, that can't be cut, and the reason."""

    name: str
    size: int
    reason: str
    """The cause, the operation that is, and the line that calls it."""
    cause: str
    """The cause alone."""
