"""From channel ids to groups, and to the dependency graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.fx.node import Node

from secateur.graph.channel_ids import Consumer, Ids, Layer
from secateur.graph.dependency import (
    NOT_PRUNABLE,
    DependencyGraph,
    SizedAttribute,
    Slots,
    aliases_of,
)
from secateur.graph.groups import FrozenGroup, Group, Tap
from secateur.graph.network_graph import first_input, operation_name, shape_of
from secateur.graph.propagation import ChannelPropagation
from secateur.runtime.module_state import tensors_of

NO_CONSUMER = "read by no convolution or linear layer"


NOT_IN_IMAGES = "read only where positions of several images are mixed"


SINGLE = "all its filters hang together"


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


def assemble(
    model: nn.Module,
    spread: ChannelPropagation,
    frozen_ids: Iterable[tuple[Ids, str]] = (),
    attributes: tuple[SizedAttribute, ...] = (),
) -> DependencyGraph:
    """The dependency graph that follows from ids that have been through the whole graph.

    `frozen_ids` are channels that must stay, with the reason.
    """
    aliases = aliases_of(model)
    placeholders: dict[str, Node] = {}
    for node, name in spread.graph.tensor_names.items():
        for alias in aliases[name]:
            twin = placeholders.setdefault(alias, node)
            if twin is not node:
                for one, other in zip(spread.axes[twin], spread.axes[node], strict=True):
                    spread.tie(one, other, "one parameter in two roles")
    root = spread.roots()
    groups, frozen = group_channels(spread, root, spread.reasons(root, frozen_ids))
    prunable = np.zeros(spread.size, dtype=bool)
    for group in groups.values():
        prunable[group.channels] = True
    channel_of = np.where(prunable[root], root, NOT_PRUNABLE)
    slots = tuple(
        Slots(alias, dim, channel_of[ids])
        for alias, node in placeholders.items()
        for dim, ids in enumerate(spread.axes[node])
        if ids is not None and (channel_of[ids] != NOT_PRUNABLE).any()
    )
    tensors = tensors_of(model)
    return DependencyGraph(
        graph=spread.graph,
        groups=groups,
        frozen=frozen,
        slots=slots,
        layers=tuple(spread.layers),
        consumers=tuple(spread.readers),
        covers=_covers(
            [slots.channels for slots in slots], [channel_of[i] for i in spread.written]
        ),
        attributes=attributes,
        axes=spread.axes,
        several=spread.several,
        mixing=frozenset(spread.mixing),
        channel_of=channel_of,
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        parameters=frozenset(name for name, _ in model.named_parameters()),
        product_macs=spread.product_macs,
        resizes=spread.resizes,
    )


def _covers(*dimensions: list[Ids]) -> tuple[Ids, ...]:
    """The distinct sets of channels that make up whole dimensions, none of which holds another."""
    found = {}
    for channels in (each for part in dimensions for each in part):
        if (channels != NOT_PRUNABLE).all():
            unique = np.unique(channels)
            found[unique.tobytes()] = unique
    smallest: list[Ids] = []
    holding: dict[int, list[frozenset[int]]] = {}
    for cover in sorted(found.values(), key=len):
        members = frozenset(cover.tolist())
        if not any(known <= members for c in members for known in holding.get(c, ())):
            smallest.append(cover)
            holding.setdefault(min(members), []).append(members)
    return tuple(smallest)
