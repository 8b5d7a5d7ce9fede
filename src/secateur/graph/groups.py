"""From channel ids to groups: channels of one width that are chosen together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.fx.node import Node

from secateur.graph.channel_ids import (
    ChannelPropagation,
    Consumer,
    Ids,
    Layer,
    first_input,
    shape_of,
)
from secateur.graph.trace import operation_name

NO_CONSUMER = "read by no convolution or linear layer"
NOT_IN_IMAGES = "read only where positions of several images are mixed"
SINGLE = "all its filters hang together"


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


@dataclass(eq=False)
class _Draft:
    """Channels found to belong together so far."""

    channels: dict[int, None] = field(default_factory=dict)
    layers: dict[str, Layer] = field(default_factory=dict)
    """Weight -> layer, in the order of execution."""
    consumers: list[Consumer] = field(default_factory=list)


def group_channels(
    spread: ChannelPropagation, root: Ids, reasons: Mapping[int, str]
) -> tuple[dict[str, Group], tuple[FrozenGroup, ...]]:
    """Groups of channels that can be cut, and those that can't with the reason.

    `root` is `[id]`: the channel of an id.
    """
    drafts = _drafts(spread, root)
    groups: dict[str, Group] = {}
    frozen: list[FrozenGroup] = []
    for draft in drafts:
        first = next(iter(draft.layers.values()))
        name = first.name if first.name not in groups else first.weight
        why = {c: reasons[c] for c in draft.channels if c in reasons}
        free = np.array([c for c in draft.channels if c not in why], dtype=np.int64)
        looks: list[Tap] = []
        if len(free) == 1 and len(draft.channels) > 1 and not why:
            why = dict.fromkeys(free.tolist(), SINGLE)
        elif len(free):
            looks, problem = _taps(spread, root, draft.consumers, free)
            seen = set().union(*(set(look.channel.tolist()) for look in looks))
            why |= {int(c): problem for place, c in enumerate(free) if place not in seen}
            if len(seen) < len(free):
                free = np.array([c for c in free.tolist() if c not in why], dtype=np.int64)
                looks = _taps(spread, root, draft.consumers, free)[0] if len(free) else []
        for reason in dict.fromkeys(why.values()):
            size = sum(each == reason for each in why.values())
            frozen.append(FrozenGroup(first.name, size, reason))
        if looks:
            layers, readers = tuple(draft.layers.values()), tuple(draft.consumers)
            groups[name] = Group(name, free, layers, readers, tuple(looks))
    return groups, tuple(frozen)


def _drafts(spread: ChannelPropagation, root: Ids) -> list[_Draft]:
    """Channels that are written by one layer, or by layers that share channels, together."""
    drafts: list[_Draft] = []
    member: dict[int, _Draft] = {}
    for layer in spread.layers:
        if layer.produced is None:
            continue
        channels = dict.fromkeys(root[layer.produced].tolist())
        found = list({id(member[c]): member[c] for c in channels if c in member}.values())
        if not found:
            found = [_Draft()]
            drafts += found
        draft, *rest = found
        for other in rest:
            draft.channels.update(other.channels)
            draft.layers.update(other.layers)
            member.update(dict.fromkeys(other.channels, draft))
            drafts.remove(other)
        draft.layers.setdefault(layer.weight, layer)
        draft.channels.update(channels)
        member.update(dict.fromkeys(channels, draft))
    for reader in spread.readers:
        read = np.unique(root[reader.channels]).tolist()
        for draft in {id(member[c]): member[c] for c in read if c in member}.values():
            draft.consumers.append(reader)
    return drafts


def _taps(
    spread: ChannelPropagation, root: Ids, readers: list[Consumer], free: Ids
) -> tuple[list[Tap], str]:
    """As few places as show every channel that can be seen; and why others can't be."""
    number = np.full(spread.size, -1, dtype=np.int64)
    number[free] = np.arange(len(free))
    missing = np.ones(len(free), dtype=bool)
    looks: list[Tap] = []
    problem = NO_CONSUMER
    for reader in readers:
        node = _feature_map(first_input(reader.node))
        if shape_of(node)[0] != spread.graph.images:
            problem = NOT_IN_IMAGES
            continue
        dims = [
            (int(missing[numbers[numbers >= 0]].any()), dim, numbers)
            for dim, ids in enumerate(spread.axes[node])
            if ids is not None
            for numbers in (number[root[ids]],)
        ]
        for shows_more, dim, numbers in dims:
            if shows_more:
                index = np.flatnonzero(numbers >= 0)
                looks.append(Tap(node, dim, index, numbers[index]))
                missing[numbers[index]] = False
        if not missing.any():
            break
    return looks, problem


def _feature_map(node: Node) -> Node:
    """The value itself, or what it was before pooling or flattening left it without positions."""
    found = node
    while not _has_positions(found):
        name = operation_name(found)
        keeps = name in _FLATTENING or "pool" in name
        if not keeps or not isinstance(found.args[0], Node):
            return node
        found = found.args[0]
    return found


_FLATTENING = {
    *("flatten", "view", "reshape", "squeeze", "mean", "dropout", "feature_dropout", "clone"),
    *("contiguous", "permute", "transpose"),
}


def _has_positions(node: Node) -> bool:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return True
    return sum(size > 1 for size in value.shape[1:]) > 1
