"""The regression targets of a layer, from the original and the cut network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor
from torch.fx.node import Node

from secateur.graph.interpreter import GraphInterpreter
from secateur.graph.network_graph import NetworkGraph, operation_name
from secateur.pruning.refit.layers import RefitLayer
from secateur.pruning.refit.regression_targets import OffsetPlace, RegressionTargets
from secateur.pruning.refit.rows import at_positions

SMALLEST_SCALE = 1e-3
"""A norm that scales a channel by less passes no correction back to the layer before it."""


@dataclass(frozen=True, eq=False)
class TargetLayer:
    """A layer with what follows it, which decides what it should output.

    The target is the output of the original network's layer. If the output goes into a sum,
    directly or through a norm, the target is what makes the sum right, so that it also corrects
    errors in the other summand.
    """

    layer: RefitLayer
    norm: Node | None
    sum: Node | None
    other: Node | None
    """The other summand."""
    goal: Node
    """The operation of the original network that gives the target: behind the branches that the
    cut network lacks, whose work the layer takes over."""

    @property
    def rectified(self) -> bool:
        """Whether only a rectifier reads the output of the layer, its norm or its sum."""
        return [operation_name(user) for user in self.goal.users] == ["relu"]

    @property
    def value_node(self) -> Node:
        """The operation of the cut network whose value is compared with the goal's."""
        return self.sum or self.norm or self.layer.node

    def at(
        self,
        full: GraphInterpreter,
        cut: GraphInterpreter,
        state: Mapping[str, Tensor],
        positions: Int[Tensor, "image chosen"],
    ) -> RegressionTargets:
        """Return the targets at some positions of each image.

        Both interpreters must have come to the layer; `full` is behind it afterwards.
        """
        layer, count = self.layer, len(positions)
        kept = layer.kept

        def sampled(node: Node, value: Tensor) -> Tensor:
            maps = layer.maps(kept.select(node, value[:count], layer.channel_dim))
            return kept.select_last(node, at_positions(maps, positions), layer.channel_dim)

        wanted = sampled(layer.node, full.step(layer.node))
        scale, offset = wanted.new_ones(()), wanted.new_zeros(())
        if self.norm is not None:
            scale, offset = affine(kept.dependencies.graph, state, self.norm)
            strong = scale.abs() > SMALLEST_SCALE
            scale = scale.where(strong, 1.0)
        result = wanted * scale + offset
        if self.goal is not (self.norm or layer.node):
            result = sampled(self.goal, full.copy().step(self.goal))
            summand = (result - offset) / scale
        if self.sum is not None and self.other is not None:
            ahead = cut
            if not cut.has(self.other):
                ahead = cut.copy()
                ahead.advance(self.sum)
            other = at_positions(layer.maps(ahead.value(self.other)[:count]), positions)
            summand = (result - other - offset) / scale
        if self.goal is not (self.norm or layer.node):
            wanted = summand if self.norm is None else summand.where(strong, wanted)
        if layer.bias is not None:
            wanted = wanted - state[layer.bias]
        return RegressionTargets(wanted, wanted - result / scale, scale.expand(wanted.shape[-1]))


def target_layer(layer: RefitLayer) -> TargetLayer:
    """Return a layer together with the norm and the sum behind it."""
    norm = _norm_behind(layer)
    last = norm or layer.node
    users = list(last.users)
    without_sum = TargetLayer(layer, norm, None, None, _goal(layer, last))
    if len(users) != 1 or operation_name(users[0]) != "add" or users[0].kwargs:
        return without_sum
    summands = [source for source in users[0].args if isinstance(source, Node)]
    shapes = {tuple(source.meta["val"].shape[1:]) for source in summands}
    if len(summands) != 2 or len(shapes) != 1 or summands[0] is summands[1]:
        return without_sum
    other = summands[0] if summands[1] is last else summands[1]
    if other.op != "call_function":
        return without_sum
    return TargetLayer(layer, norm, users[0], other, _goal(layer, users[0]))


def _goal(layer: RefitLayer, value: Node) -> Node:
    """Return the operation whose value in the original a value of the cut network should have.

    That is the value itself, or the last of the sums that are nothing but the value now.
    """
    dropped = {branch.shortcut: branch for branch in layer.kept.dropped}
    goal, node = value, value
    while True:
        behind = list(node.users)
        if len(behind) == 1 and operation_name(behind[0]) == "relu":
            node = behind[0]
        branch = dropped.get(node)
        if branch is None or not set(node.users) <= {branch.sum, *branch.nodes}:
            break
        if node is not goal and [operation_name(n) for n in branch.sum.users] != ["relu"]:
            break
        goal = node = branch.sum
    return goal


def _norm_behind(layer: RefitLayer) -> Node | None:
    """Return the batch norm that alone reads a layer, if it uses running statistics."""
    graph = layer.kept.dependencies.graph
    users = list(layer.node.users)
    if len(users) != 1 or operation_name(users[0]) != "batch_norm":
        return None
    norm = users[0]
    if layer.channel_dim != 1 or norm.args[0] is not layer.node or norm.args[3] is None:
        return None
    sources = [source for source in norm.args[1:5] if source is not None]
    return norm if all(source in graph.tensor_names for source in sources) else None


def affine(graph: NetworkGraph, state: Mapping[str, Tensor], norm: Node) -> tuple[Tensor, Tensor]:
    """Return scale and offset of a batch norm in evaluation mode."""
    weight, bias, mean, variance = (
        None if source is None else state[graph.tensor_names[source]]  # type: ignore[index]
        for source in norm.args[1:5]
    )
    assert mean is not None
    assert variance is not None
    epsilon = norm.args[7]
    assert isinstance(epsilon, float)
    scale = (variance + epsilon).rsqrt()
    scale = scale if weight is None else scale * weight
    offset = -mean * scale
    return scale, offset if bias is None else offset + bias


def offset_place(targets: Sequence[TargetLayer]) -> OffsetPlace | None:
    """Return where an offset can go for all uses of a layer; None if there is no such place.

    It is the bias, or the running mean of a norm that alone reads the layer.
    """
    places = {_offset_place(target) for target in targets}
    place = places.pop()
    if place is None or places:
        return None
    names = targets[0].layer.kept.dependencies.graph.tensor_names
    (holder,) = (node for node, name in names.items() if name == place.name)
    consumers = {target.layer.node for target in targets} | {target.norm for target in targets}
    return place if set(holder.users) <= consumers else None


def _offset_place(target: TargetLayer) -> OffsetPlace | None:
    if target.layer.bias is not None:
        return OffsetPlace(target.layer.bias, 1)
    if target.norm is None:
        return None
    mean = target.norm.args[3]
    assert isinstance(mean, Node)
    return OffsetPlace(target.layer.kept.dependencies.graph.tensor_names[mean], -1)
