"""What a layer of a cut network should answer, and where an offset of its answer can go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.fx.node import Node

from secateur.graph.interpreter import GraphInterpreter
from secateur.graph.network_graph import NetworkGraph, operation_name
from secateur.pruning.refit.layers import RefitLayer, at, by_group

SMALLEST_SCALE = 1e-3
"""A norm that scales a channel by less passes no correction back to the layer before it."""
State = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class RegressionTargets:
    """What a layer should answer at some positions of some images, without its bias."""

    wanted: Float[Tensor, "*row output"]
    level: Float[Tensor, "*row output"]
    """The answer at which what is made right is zero, where a rectifier behind it turns on."""
    scale: Float[Tensor, "*#row output"]
    """By how much that grows with the answer: the scale of a norm behind the layer, or 1."""

    def parted(self, images: Int[Tensor, "image"], groups: int) -> RegressionTargets:
        """In float64, of some images, as `[group, row, output]`."""
        wanted, level = (by_group(v[images].double(), groups) for v in (self.wanted, self.level))
        return RegressionTargets(wanted, level, self.scale.double().reshape(groups, 1, -1))

    def let_through(self, found: Float[Tensor, "*row output"]) -> Float[Tensor, "*row output"]:
        """What the rectifier makes of an answer that was found."""
        return (self.scale * (found - self.level)).relu()

    def renewed(self, found: Float[Tensor, "*row output"]) -> Float[Tensor, "*row output"]:
        """What should be answered instead, where a rectifier hides what was found.

        Where it should be off, an answer that leaves it off is right already, and one that does
        not need only come down to the level (Zhang et al., TPAMI 2016, section 3.3).
        """
        should_be_off = self.scale * (self.wanted - self.level) <= 0
        is_off = self.scale * (found - self.level) <= 0
        return torch.where(should_be_off, torch.where(is_off, found, self.level), self.wanted)


@dataclass(frozen=True, eq=False)
class TargetLayer:
    """What a layer should answer: what the original network's layer does, or better.

    Where the answer goes into a sum, right away or through a norm, it is what makes the sum right
    although its other summand went astray.
    """

    consumer: RefitLayer
    norm: Node | None
    sum: Node | None
    other: Node | None

    @property
    def rectified(self) -> bool:
        """Whether only a rectifier reads what is made right."""
        last = self.sum or self.norm or self.consumer.node
        return [operation_name(user) for user in last.users] == ["relu"]

    def at(
        self,
        full: GraphInterpreter,
        cut: GraphInterpreter,
        state: Mapping[str, Tensor],
        chosen: Int[Tensor, "image chosen"],
    ) -> RegressionTargets:
        """What the layer should answer at some positions of each image, without its bias.

        Both walks have come to the layer; `full` is behind it afterwards.
        """
        consumer, count = self.consumer, len(chosen)
        remains = consumer.remains

        def sampled(node: Node, value: Tensor) -> Tensor:
            return at(consumer.maps(remains.of(node, value[:count])), chosen)

        wanted = sampled(consumer.node, full.step(consumer.node))
        scale, offset = wanted.new_ones(()), wanted.new_zeros(())
        if self.norm is not None:
            scale, offset = affine(remains.dependencies.graph, state, self.norm)
            strong = scale.abs() > SMALLEST_SCALE
            scale = scale.where(strong, 1.0)
        result = wanted * scale + offset
        if self.sum is not None and self.other is not None:
            result = sampled(self.sum, full.copy().step(self.sum))
            ahead = cut
            if not cut.has(self.other):
                ahead = cut.copy()
                ahead.advance(self.sum)
            other = at(consumer.maps(ahead.value(self.other)[:count]), chosen)
            summand = (result - other - offset) / scale
            wanted = summand if self.norm is None else torch.where(strong, summand, wanted)
        bias = bias_of(consumer)
        if bias is not None:
            wanted = wanted - state[bias]
        return RegressionTargets(wanted, wanted - result / scale, scale.expand(wanted.shape[-1]))


def target_layer(consumer: RefitLayer) -> TargetLayer:
    """What a layer should answer."""
    node, norm = consumer.node, _norm_behind(consumer)
    last = norm or node
    following = list(last.users)
    nothing = TargetLayer(consumer, norm, None, None)
    if len(following) != 1 or operation_name(following[0]) != "add" or following[0].kwargs:
        return nothing
    summands = [source for source in following[0].args if isinstance(source, Node)]
    shapes = {tuple(source.meta["val"].shape[1:]) for source in summands}
    if len(summands) != 2 or len(shapes) != 1 or summands[0] is summands[1]:
        return nothing
    other = summands[0] if summands[1] is last else summands[1]
    if other.op != "call_function":
        return nothing
    return TargetLayer(consumer, norm, following[0], other)


def _norm_behind(consumer: RefitLayer) -> Node | None:
    """The batch norm that alone reads a layer's answer, where it uses running statistics."""
    graph = consumer.remains.dependencies.graph
    following = list(consumer.node.users)
    if len(following) != 1 or operation_name(following[0]) != "batch_norm":
        return None
    norm = following[0]
    if consumer.channel_dim != 1 or norm.args[0] is not consumer.node or norm.args[3] is None:
        return None
    sources = [each for each in norm.args[1:5] if each is not None]
    return norm if all(each in graph.tensor_names for each in sources) else None


def affine(graph: NetworkGraph, state: Mapping[str, Tensor], norm: Node) -> tuple[Tensor, Tensor]:
    """Scale and offset of a batch norm in evaluation mode."""
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


def bias_of(consumer: RefitLayer) -> str | None:
    """The name of the layer's bias, if it has one."""
    source = consumer.node.args[2] if len(consumer.node.args) > 2 else None
    names = consumer.remains.dependencies.graph.tensor_names
    return names[source] if isinstance(source, Node) else None


@dataclass(frozen=True)
class OffsetPlace:
    """A parameter or buffer that shifts the answers of a layer."""

    name: str
    sign: int
    """-1 where a larger value shifts the answers down, as a running mean does."""

    def write(self, state: State, offset: Tensor) -> None:
        """Shifts the answers."""
        state[self.name] = self._shifted(state, offset)

    def rounded(self, state: State, offset: Tensor) -> Tensor:
        """The offset that they would really get, with what the place can hold."""
        old = state[self.name].double()
        return self.sign * (self._shifted(state, offset).double() - old).reshape(offset.shape)

    def _shifted(self, state: State, offset: Tensor) -> Tensor:
        old = state[self.name]
        return (old.double() + self.sign * offset.flatten()).to(old.dtype)


def offset_place(targets: Sequence[TargetLayer]) -> OffsetPlace | None:
    """Where an offset can go that all places share where a layer is used.

    The bias, or the running mean of the norm that reads the layer alone.
    """
    places = {_own_place(target) for target in targets}
    place = places.pop()
    if place is None or places:
        return None
    names = targets[0].consumer.remains.dependencies.graph.tensor_names
    (holder,) = (node for node, name in names.items() if name == place.name)
    readers = {target.consumer.node for target in targets} | {target.norm for target in targets}
    return place if set(holder.users) <= readers else None


def _own_place(target: TargetLayer) -> OffsetPlace | None:
    bias = bias_of(target.consumer)
    if bias is not None:
        return OffsetPlace(bias, 1)
    if target.norm is None:
        return None
    mean = target.norm.args[3]
    assert isinstance(mean, Node)
    return OffsetPlace(target.consumer.remains.dependencies.graph.tensor_names[mean], -1)
