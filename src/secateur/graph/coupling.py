"""Couples channels: propagated ids become groups, and these the dependency graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.fx.node import Node

from secateur.graph.call_sites import call_site
from secateur.graph.channel_ids import Consumer, Ids, Layer, index_table
from secateur.graph.dependency import (
    NOT_PRUNABLE,
    DependencyGraph,
    SizedAttribute,
    Slots,
    aliases_of,
)
from secateur.graph.groups import FrozenGroup, Group, Reason, Tap
from secateur.graph.module_state import tensors_of
from secateur.graph.network_graph import first_input, operation_name, shape_of
from secateur.graph.propagation import ChannelPropagation

NO_CONSUMER = "read by no convolution or linear layer"
NOT_IN_IMAGES = "read only where positions of several images are mixed"
SINGLE = "all its filters are coupled to each other"


@dataclass(frozen=True, eq=False)
class CoupledChannels:
    """A network's ids after propagation, and which of them are one channel."""

    model: nn.Module
    propagation: ChannelPropagation
    roots: Ids
    """`[id]`: the smallest id of the same channel, which stands for the channel."""
    parameter_nodes: Mapping[str, Node]
    """Name of a parameter or buffer -> its placeholder; shared ones have one under all names."""
    needs_consumers: bool = True
    """Whether only channels that a layer reads can be cut, since scores are taken there."""


def couple_channels(model: nn.Module, propagation: ChannelPropagation) -> CoupledChannels:
    """Return the channels of `model`; a parameter that is shared has the same ones everywhere."""
    aliases = aliases_of(model)
    nodes: dict[str, Node] = {}
    for node, name in propagation.graph.tensor_names.items():
        for alias in aliases[name]:
            first = nodes.setdefault(alias, node)
            if first is not node:
                for one, other in zip(propagation.axes[first], propagation.axes[node], strict=True):
                    propagation.couple(one, other, "one parameter in two roles")
    roots = propagation.roots()
    propagation.drop_idle_sizes(roots)
    return CoupledChannels(model, propagation, roots, nodes)


def assemble(
    coupled: CoupledChannels,
    frozen_ids: Iterable[tuple[Ids, Reason]] = (),
    attributes: tuple[SizedAttribute, ...] = (),
) -> DependencyGraph:
    """Return the dependency graph with further ids frozen, each with the reason."""
    propagation, roots, model = coupled.propagation, coupled.roots, coupled.model
    groups, frozen = _group_channels(coupled, propagation.reasons(roots, frozen_ids))
    is_prunable = np.zeros(propagation.id_count, dtype=bool)
    for group in groups.values():
        is_prunable[group.channels] = True
    channel_of = np.where(is_prunable[roots], roots, NOT_PRUNABLE)
    slots = tuple(
        Slots(name, dim, channel_of[ids])
        for name, node in coupled.parameter_nodes.items()
        for dim, ids in enumerate(propagation.axes[node])
        if ids is not None and (channel_of[ids] != NOT_PRUNABLE).any()
    )
    return DependencyGraph(
        graph=propagation.graph,
        groups=groups,
        frozen=frozen,
        slots=slots,
        layers=tuple(propagation.layers),
        consumers=tuple(propagation.consumers),
        covers=_smallest_covers(
            [*(slots.channels for slots in slots), *(channel_of[i] for i in propagation.covers)]
        ),
        attributes=attributes,
        axes=propagation.axes,
        multi_output_axes=propagation.multi_output_axes,
        mixing=frozenset(propagation.mixing),
        channel_of=channel_of,
        shapes={name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()},
        parameters=frozenset(name for name, _ in model.named_parameters()),
        product_macs=propagation.product_macs,
        resizes=propagation.resizes,
        weight_norms=tuple(propagation.weight_norms),
    )


@dataclass(eq=False)
class _Draft:
    """Channels that belong to one group as far as is known."""

    channels: dict[int, None] = field(default_factory=dict)
    layers: dict[str, Layer] = field(default_factory=dict)
    """Weight -> layer, in the order of execution."""
    consumers: list[Consumer] = field(default_factory=list)


def _group_channels(
    coupled: CoupledChannels, reasons: Mapping[int, Reason]
) -> tuple[dict[str, Group], tuple[FrozenGroup, ...]]:
    """Return the groups of channels that can be cut, and those that can't, with the reason.

    `reasons` says why channels must stay.
    """
    groups: dict[str, Group] = {}
    frozen: list[FrozenGroup] = []
    for draft in _draft_groups(coupled):
        first = next(iter(draft.layers.values()))
        name = first.name if first.name not in groups else first.weight
        why_frozen = {c: reasons[c] for c in draft.channels if c in reasons}
        free = np.array([c for c in draft.channels if c not in why_frozen], dtype=np.int64)
        taps: list[Tap] = []
        if len(free) == 1 and len(draft.channels) > 1 and not why_frozen:
            why_frozen = dict.fromkeys(free.tolist(), Reason(SINGLE))
        elif len(free) and coupled.needs_consumers:
            taps, problem = _find_taps(coupled, draft.consumers, free)
            tapped = set().union(*(set(tap.channel.tolist()) for tap in taps))
            why_frozen |= {int(c): problem for i, c in enumerate(free) if i not in tapped}
            if len(tapped) < len(free):
                free = np.array([c for c in free.tolist() if c not in why_frozen], dtype=np.int64)
                taps = _find_taps(coupled, draft.consumers, free)[0] if len(free) else []
        for reason, size in Counter(why_frozen.values()).items():
            frozen.append(FrozenGroup(first.name, size, str(reason), reason.cause))
        if taps or (len(free) and not coupled.needs_consumers):
            layers, consumers = tuple(draft.layers.values()), tuple(draft.consumers)
            groups[name] = Group(name, free, layers, consumers, tuple(taps))
    return groups, tuple(frozen)


def _draft_groups(coupled: CoupledChannels) -> list[_Draft]:
    """Return the channels of each layer, those of layers that share channels together."""
    roots = coupled.roots
    drafts: list[_Draft] = []
    draft_of: dict[int, _Draft] = {}
    for layer in coupled.propagation.layers:
        if layer.produced is None:
            continue
        channels = dict.fromkeys(roots[layer.produced].tolist())
        sharing = list({id(draft_of[c]): draft_of[c] for c in channels if c in draft_of}.values())
        if not sharing:
            sharing = [_Draft()]
            drafts += sharing
        draft, *rest = sharing
        for other in rest:
            draft.channels.update(other.channels)
            draft.layers.update(other.layers)
            draft_of.update(dict.fromkeys(other.channels, draft))
            drafts.remove(other)
        draft.layers.setdefault(layer.weight, layer)
        draft.channels.update(channels)
        draft_of.update(dict.fromkeys(channels, draft))
    for consumer in coupled.propagation.consumers:
        read = np.unique(roots[consumer.channels]).tolist()
        for draft in {id(draft_of[c]): draft_of[c] for c in read if c in draft_of}.values():
            draft.consumers.append(consumer)
    return drafts


def _find_taps(
    coupled: CoupledChannels, consumers: list[Consumer], channels: Ids
) -> tuple[list[Tap], Reason]:
    """Return few taps that together show every channel, and why channels without one have none."""
    propagation = coupled.propagation
    table = index_table(channels, propagation.id_count)
    is_missing = np.ones(len(channels), dtype=bool)
    taps: list[Tap] = []
    problem = Reason(NO_CONSUMER)
    for consumer in consumers:
        node = _image_first(_feature_map(first_input(consumer.node)), propagation.graph.images)
        if shape_of(node)[0] != propagation.graph.images:
            problem = Reason(NOT_IN_IMAGES, call_site(consumer.node))
            continue
        numbers_by_dim = [
            (dim, table[coupled.roots[ids]])
            for dim, ids in enumerate(propagation.axes[node])
            if ids is not None
        ]
        # All dimensions are compared with what the taps before this node have left out.
        for dim, numbers in [
            (dim, numbers)
            for dim, numbers in numbers_by_dim
            if is_missing[numbers[numbers >= 0]].any()
        ]:
            index = np.flatnonzero(numbers >= 0)
            taps.append(Tap(node, dim, index, numbers[index]))
            is_missing[numbers[index]] = False
        if not is_missing.any():
            break
    if is_missing.any() and problem.cause == NO_CONSUMER:
        problem = Reason(NO_CONSUMER, _last_use(coupled, channels[is_missing]))
    return taps, problem


def _last_use(coupled: CoupledChannels, channels: Ids) -> str:
    """Return the last operation that reads channels, and where it is called."""
    propagation = coupled.propagation
    for node in reversed(propagation.graph.nodes):
        for source in node.all_input_nodes if node.op == "call_function" else ():
            for ids in propagation.axes.get(source, ()):
                if ids is not None and np.isin(coupled.roots[ids], channels).any():
                    return call_site(node)
    return ""


def _feature_map(node: Node) -> Node:
    """Return the value, or the one before pooling or flattening that still has positions."""
    source = node
    while not _has_positions(source):
        name = operation_name(source)
        keeps_channels = name in _FLATTENING or "pool" in name
        if not keeps_channels or not isinstance(source.args[0], Node):
            return node
        source = source.args[0]
    return source


def _image_first(node: Node, images: int) -> Node:
    """Return the value, or the one before it was permuted, of which the first dimension is images.

    Recurrent layers, for one, read positions first.
    """
    source = node
    while shape_of(source)[0] != images and operation_name(source) in ("permute", "transpose"):
        source = first_input(source)
    return source if shape_of(source)[0] == images else node


_FLATTENING = {
    *("flatten", "view", "reshape", "squeeze", "mean", "dropout", "feature_dropout", "clone"),
    *("contiguous", "permute", "transpose"),
}


def _has_positions(node: Node) -> bool:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return True
    return sum(size > 1 for size in value.shape[1:]) > 1


def _smallest_covers(dimensions: list[Ids]) -> tuple[Ids, ...]:
    """Return the distinct sets of channels that make up whole dimensions, none a superset."""
    distinct: dict[bytes, Ids] = {}
    for channels in dimensions:
        if (channels != NOT_PRUNABLE).all():
            unique = np.unique(channels)
            distinct[unique.tobytes()] = unique
    smallest: list[Ids] = []
    known: dict[int, list[frozenset[int]]] = {}
    """Smallest channel of a set -> the sets."""
    for cover in sorted(distinct.values(), key=len):
        members = frozenset(cover.tolist())
        if not any(subset <= members for c in members for subset in known.get(c, ())):
            smallest.append(cover)
            known.setdefault(min(members), []).append(members)
    return tuple(smallest)
