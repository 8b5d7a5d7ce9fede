"""The parts of a network whose kernels are estimated together: those around a group of channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor
from torch.fx.node import Node

from secateur.graph.channel_ids import Layer
from secateur.graph.dependency import Removed
from secateur.graph.groups import Group
from secateur.graph.kept_channels import KeptChannels
from secateur.graph.network_graph import NetworkGraph, operation_name
from secateur.graph.patches import CONVOLUTIONS
from secateur.pruning.refit.kernel_uses import why_not_refitted
from secateur.pruning.refit.layers import RefitLayer, refit_layer
from secateur.pruning.refit.regression_targets import OffsetPlace
from secateur.pruning.refit.rows import from_patch_order
from secateur.pruning.refit.target_layers import TargetLayer, offset_place, target_layer

LEAST_REMOVED = 0.2
"""Fraction of its channels that a group has lost, at least: others have little to gain."""


@dataclass(frozen=True, eq=False)
class SegmentKernel:
    """A kernel that is estimated, and where its offset goes."""

    layer: RefitLayer
    norm: Node | None
    """The batch norm that alone reads the layer, if there is one."""
    place: OffsetPlace | None
    rows: Bool[Tensor, "group output"]
    """Outputs that may change: what is read elsewhere may not."""

    def shaped(self, kernel: Tensor, like: Tensor) -> Tensor:
        """Return a kernel in the shape that the layer has it in."""
        return from_patch_order(kernel, like.shape).to(like.dtype)


@dataclass(frozen=True, eq=False)
class Segment:
    """The part of the network whose kernels are estimated together."""

    group: str
    kernels: tuple[SegmentKernel, ...]
    """In the order of execution."""
    targets: tuple[TargetLayer, ...]
    rectified: bool
    """Whether only errors behind a rectifier count, at targets that one alone reads."""
    last: Node
    """The operation behind the last target."""
    behind_goals: Node
    """That behind the last of the goals in the original network."""

    @property
    def first(self) -> Node:
        """The first operation with a kernel that is estimated."""
        return self.kernels[0].layer.node

    @property
    def weights(self) -> list[str]:
        """Names of the kernels."""
        return [kernel.layer.layer.weight for kernel in self.kernels]

    @property
    def positions(self) -> int:
        """Positions of the target with the largest maps."""
        return max(target.layer.positions for target in self.targets)


def find_segments(
    kept: KeptChannels, removed: Removed, uses: Mapping[str, list[Layer]], *, rectified: bool
) -> list[Segment]:
    """Return the groups that lost channels, in the order of execution."""
    dependencies = kept.dependencies
    place = {node: number for number, node in enumerate(dependencies.graph.nodes)}
    segments = []
    for name, group in dependencies.groups.items():
        if len(removed.get(name, ())) < max(1, LEAST_REMOVED * len(group)):
            continue
        producers, consumers = _layers_around(group, dependencies.graph, uses)
        if not producers or not consumers:
            continue
        targets = tuple(target_layer(refit_layer(layer, kept)) for layer in consumers)
        values = [place[target.value_node] for target in targets]
        if max(place[layer.node] for layer in producers) > min(values):
            continue  # a whole stage, coupled by its residual sums
        kernels = [_kernel(layer, kept, group) for layer in producers]
        kernels += [_kernel(layer, kept, None) for layer in consumers]
        kernels.sort(key=lambda kernel: place[kernel.layer.node])
        last = dependencies.graph.nodes[max(values) + 1]
        goals = max(place[target.goal] for target in targets)
        behind_goals = dependencies.graph.nodes[goals + 1]
        segments.append(Segment(name, tuple(kernels), targets, rectified, last, behind_goals))
    return sorted(segments, key=lambda segment: place[segment.first])


def _layers_around(
    group: Group, graph: NetworkGraph, uses: Mapping[str, list[Layer]]
) -> tuple[list[Layer], list[Layer]]:
    """Return the layers that produce a group, and those that read it, in the order of execution.

    Left out are producers that can't be estimated. If a reader can't be there are none at all.
    """
    by_node = {layers[0].node: layers for layers in uses.values()}
    nodes = {consumer.node for consumer in group.consumers}

    def is_usable(node: Node) -> bool:
        layers = by_node.get(node, [])
        is_alone = len(layers) == 1 and not why_not_refitted(graph, layers)
        operation = operation_name(node)
        return is_alone and (operation == "linear" or operation in CONVOLUTIONS)

    if not all(map(is_usable, nodes)):
        return [], []
    produced = {layer.node for layer in group.layers if is_usable(layer.node)} - nodes
    return (
        [layers[0] for node, layers in by_node.items() if node in produced],
        [layers[0] for node, layers in by_node.items() if node in nodes],
    )


def _kernel(layer: Layer, kept: KeptChannels, group: Group | None) -> SegmentKernel:
    """Return a kernel of which all rows may change, or those that produce a group's channels."""
    used = refit_layer(layer, kept)
    stays = kept.mask(layer.node, used.channel_dim).astype(bool)
    rows = np.ones(int(stays.sum()), dtype=bool)
    if group is not None:
        assert layer.produced is not None
        rows = np.isin(kept.dependencies.channel_of[layer.produced], group.channels)[stays]
    by_group = torch.from_numpy(rows).reshape(used.groups, -1)
    target = target_layer(used)
    return SegmentKernel(used, target.norm, offset_place([target]), by_group)
