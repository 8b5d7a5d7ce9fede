"""Rules of operations on each value, on neighbouring positions, and across a dimension."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor
from torch.fx.node import Node

from secateur.graph.channel_ids import Axes, Ids
from secateur.graph.network_graph import argument, first_input, shape_of
from secateur.graph.propagation import ChannelPropagation, fixed_axes


def keep(spread: ChannelPropagation, node: Node) -> Axes:
    """One value in, one value out."""
    return spread.axes[first_input(node)]


def combine(spread: ChannelPropagation, node: Node) -> Axes:
    """Ties the operands along every dimension that is not broadcast."""
    return _combined(spread, node, lambda one, other: spread.tie(one, other, ""))


def _combined(spread: ChannelPropagation, node: Node, tie: Callable[[Ids, Ids], None]) -> Axes:
    shape = shape_of(node)
    sources = [s for s in node.all_input_nodes if isinstance(s.meta.get("val"), Tensor)]
    result: list[Ids | None] = [None] * len(shape)
    for dim in range(1, len(shape) + 1):
        size = shape[-dim]
        parts = []
        for source in sources:
            axes = spread.axes[source]
            if dim > len(axes):
                continue
            own = shape_of(source)[-dim]
            if own == 1 and size != 1:
                spread.freeze((axes[-dim],), "one channel that is spread over others")
            else:
                parts.append(axes[-dim])
        known = [ids for ids in parts if ids is not None]
        if known:
            result[-dim] = known[0]
            if len(known) < len(parts):
                spread.freeze(known, "combined with a value of fixed size")
            for ids in known[1:]:
                tie(known[0], ids)
    return tuple(result)


def add(spread: ChannelPropagation, node: Node) -> Axes:
    """As `combine`; a sum with what one summand was computed from makes a residual stream."""
    sources = [s for s in node.all_input_nodes if isinstance(s.meta.get("val"), Tensor)]
    if len(sources) == 2:
        one, other = sources
        if _is_shortcut(spread, one, other) or _is_shortcut(spread, other, one):
            return _combined(spread, node, lambda *ids: spread.shortcuts.append(ids))
    return combine(spread, node)


def _is_shortcut(spread: ChannelPropagation, value: Node, other: Node) -> bool:
    """Whether a value, before operations that keep its channels, is what the other came from."""
    ids = _all_ids(spread.axes[value])
    if not len(ids) or not spread.depends_on(value, spread.graph.image):
        return False
    while True:
        if spread.depends_on(other, value):
            return True
        before = [
            source
            for source in value.all_input_nodes
            if source in spread.axes and spread.depends_on(source, spread.graph.image)
        ]
        if len(before) != 1:
            return False
        (value,) = before
        if not np.isin(_all_ids(spread.axes[value]), ids).any():
            return False


def _all_ids(axes: Axes) -> Ids:
    return np.concatenate([np.zeros(0, dtype=np.int64), *(i for i in axes if i is not None)])


def pool(spread: ChannelPropagation, node: Node) -> Axes | list[Axes]:
    """Windows of positions: channels must lie along dimension 1."""
    return _over_positions(spread, node, "pooled over as if they were positions")


def upsample(spread: ChannelPropagation, node: Node) -> Axes | list[Axes]:
    """More, or fewer, positions."""
    return _over_positions(spread, node, "resized as if they were positions")


def _over_positions(spread: ChannelPropagation, node: Node, reason: str) -> Axes | list[Axes]:
    axes = spread.axes[first_input(node)]
    value = node.meta["val"]
    several = not isinstance(value, Tensor)
    rank = (value[0] if several else value).dim()
    spread.freeze(axes[2:], reason)
    result = (*axes[:2], *(None for _ in range(2, rank)))
    return [result] * len(value) if several else result


def item(spread: ChannelPropagation, node: Node) -> Axes:
    """One of several values of an operation."""
    source, index = first_input(node), node.args[1]
    assert isinstance(index, int)
    return spread.several[source][index]


def reduce(spread: ChannelPropagation, node: Node) -> Axes | list[Axes]:
    """Means, sums, norms: a dimension goes, and with it the channels along it."""
    if len(node.args) > 1 and isinstance(node.args[1], Node):
        return combine(spread, node)  # the larger of two values
    axes = spread.axes[first_input(node)]
    dims = argument(node, "dim")
    if dims is None:
        if any(ids is not None for ids in axes):
            return spread.refuse(node, "taken together over every dimension")  # type: ignore[no-any-return]
        return fixed_axes(node)  # type: ignore[no-any-return]
    reduced = {int(d) % len(axes) for d in (dims if isinstance(dims, list | tuple) else [dims])}
    reduced = reduced or set(range(len(axes)))
    if any(axes[dim] is not None for dim in reduced):
        spread.mixing.add(node)
    if argument(node, "keepdim", False):
        result = tuple(None if dim in reduced else ids for dim, ids in enumerate(axes))
    else:
        result = tuple(ids for dim, ids in enumerate(axes) if dim not in reduced)
    value: Any = node.meta["val"]
    return result if isinstance(value, Tensor) else [result] * len(value)


def normalise(spread: ChannelPropagation, node: Node) -> Axes:
    """Softmax: every value by all along one dimension, which keeps its channels."""
    axes = spread.axes[first_input(node)]
    if axes[argument(node, "dim")] is not None:
        spread.mixing.add(node)
    return axes


def product(spread: ChannelPropagation, node: Node) -> Any:
    """Products of computed values, as in attention, are not followed, but counted."""
    spread.count_product(node)
    return spread.refuse(node, "multiplied by other feature maps, as in attention")
