"""Rules of elementwise operations, pooling and resizing, reductions, and products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor
from torch.fx.node import Node

from secateur.graph.channel_ids import Axes, Ids
from secateur.graph.network_graph import argument, first_input, operation_name, shape_of
from secateur.graph.propagation import ChannelPropagation, fixed_axes


def keep(propagation: ChannelPropagation, node: Node) -> Axes:
    """Elementwise operations with one input keep its channels."""
    return propagation.axes[first_input(node)]


def combine(propagation: ChannelPropagation, node: Node) -> Axes:
    """Elementwise operations with several inputs couple them along dimensions not broadcast."""
    return _combined(propagation, node, lambda one, other: propagation.couple(one, other, ""))


def _combined(
    propagation: ChannelPropagation, node: Node, couple: Callable[[Ids, Ids], None]
) -> Axes:
    shape = shape_of(node)
    sources = [s for s in node.all_input_nodes if isinstance(s.meta.get("val"), Tensor)]
    result: list[Ids | None] = [None] * len(shape)
    for dim in range(1, len(shape) + 1):  # counted from the last, as broadcasting does
        operands = []
        for source in sources:
            axes = propagation.axes[source]
            if dim > len(axes):
                continue
            if shape_of(source)[-dim] == 1 and shape[-dim] != 1:
                propagation.freeze((axes[-dim],), "one channel that is spread over others")
            else:
                operands.append(axes[-dim])
        known = [ids for ids in operands if ids is not None]
        known.sort(key=propagation.are_copies)  # copies take the channels of the others
        if len(known) < len(operands):
            propagation.freeze(known, "combined with a value of fixed size")
            known = [ids for ids in known if not propagation.are_copies(ids)]
        if known:
            result[-dim] = known[0]
            for ids in known[1:]:
                if propagation.are_copies(ids):
                    propagation.couple(known[0], ids, "")
                else:
                    couple(known[0], ids)
    return tuple(result)


def add(propagation: ChannelPropagation, node: Node) -> Axes:
    """As `combine`, but if one summand was computed from the other, as by a skip connection."""
    sources = [s for s in node.all_input_nodes if isinstance(s.meta.get("val"), Tensor)]
    if len(sources) == 2:
        one, other = sources
        if _is_skip_connection(propagation, one, other) or _is_skip_connection(
            propagation, other, one
        ):
            return _combined(
                propagation, node, lambda *ids: propagation.residual_couplings.append(ids)
            )
    return combine(propagation, node)


def _is_skip_connection(propagation: ChannelPropagation, value: Node, other: Node) -> bool:
    """Return whether `other` is computed from `value`, or from a value with the same channels."""
    ids = _all_ids(propagation.axes[value])
    if not len(ids) or not propagation.depends_on(value, propagation.graph.image):
        return False
    while True:
        if propagation.depends_on(other, value):
            return True
        before = [
            source
            for source in value.all_input_nodes
            if source in propagation.axes
            and propagation.depends_on(source, propagation.graph.image)
        ]
        if len(before) != 1:
            return False
        (value,) = before
        if not np.isin(_all_ids(propagation.axes[value]), ids).any():
            return False


def _all_ids(axes: Axes) -> Ids:
    return np.concatenate([np.zeros(0, dtype=np.int64), *(i for i in axes if i is not None)])


def copy(propagation: ChannelPropagation, node: Node) -> Axes:
    """`copy_` and `fill_` keep the shape of their first input, which the second is spread over."""
    combine(propagation, node)
    return propagation.axes[first_input(node)]


def lookup(propagation: ChannelPropagation, node: Node) -> Axes:
    """Values that are looked up in a list: the list, of one dimension, stays whole."""
    axes: dict[str, Axes] = {
        name: propagation.axes[source]
        for name in ("self", "boundaries", "sorted_sequence")
        if isinstance(source := argument(node, name), Node)
    }
    table = axes.get("boundaries", axes.get("sorted_sequence", ()))
    if len(table) != 1:
        return propagation.freeze_inputs(node, "looked up in a list for each channel")  # type: ignore[no-any-return]
    propagation.freeze(table, "a list that values are looked up in")
    return axes.get("self", ())


def pool(propagation: ChannelPropagation, node: Node) -> Axes | list[Axes]:
    """Pooling: channels must lie along dimension 1."""
    return _over_positions(propagation, node, "pooled over as if they were positions")


def random_pool(propagation: ChannelPropagation, node: Node) -> Axes | list[Axes]:
    """Pooling over windows that random numbers choose for each channel."""
    axes, samples = propagation.axes[first_input(node)], argument(node, "random_samples")
    propagation.couple(axes[1], propagation.axes[samples][1], "pooled at random for each channel")
    propagation.freeze(axes[2:], "pooled over as if they were positions")
    value: Any = node.meta["val"]
    return [(*axes[:2], *(None for _ in axes[2:]))] * len(value)


def upsample(propagation: ChannelPropagation, node: Node) -> Axes | list[Axes]:
    """Resizing: channels must lie along dimension 1."""
    return _over_positions(propagation, node, "resized as if they were positions")


def _over_positions(propagation: ChannelPropagation, node: Node, reason: str) -> Axes | list[Axes]:
    axes = propagation.axes[first_input(node)]
    value = node.meta["val"]
    has_several_values = not isinstance(value, Tensor)
    rank = (value[0] if has_several_values else value).dim()
    propagation.freeze(axes[2:], reason)
    for source in node.all_input_nodes[1:]:  # such as the places that grid_sample reads
        propagation.freeze(propagation.axes[source], reason)
    result = (*axes[:2], *(None for _ in range(2, rank)))
    return [result] * len(value) if has_several_values else result


def item(propagation: ChannelPropagation, node: Node) -> Axes:
    """Indexing picks one of an operation's several values."""
    source, index = first_input(node), node.args[1]
    assert isinstance(index, int)
    return propagation.multi_output_axes[source][index]


def reduce(propagation: ChannelPropagation, node: Node) -> Axes | list[Axes]:
    """Means, sums and norms drop a dimension, and the channels along it."""
    if len(node.args) > 1 and isinstance(node.args[1], Node):
        return combine(propagation, node)  # the larger of two values
    axes = propagation.axes[first_input(node)]
    dims = argument(node, "dim")
    if dims is None:
        if any(ids is not None for ids in axes):
            return propagation.freeze_inputs(node, "reduced over every dimension")  # type: ignore[no-any-return]
        return fixed_axes(node)  # type: ignore[no-any-return]
    reduced = {int(d) % len(axes) for d in (dims if isinstance(dims, list | tuple) else [dims])}
    reduced = reduced or set(range(len(axes)))
    channels = [ids for dim in reduced if (ids := axes[dim]) is not None]
    if channels:
        propagation.mixing.add(node)
        if _needs_two(node):
            propagation.keep_two(channels, "two channels must stay for a variance")
    if argument(node, "keepdim", False):
        result = tuple(None if dim in reduced else ids for dim, ids in enumerate(axes))
    else:
        result = tuple(ids for dim, ids in enumerate(axes) if dim not in reduced)
    value: Any = node.meta["val"]
    return result if isinstance(value, Tensor) else [result] * len(value)


def normalise(propagation: ChannelPropagation, node: Node) -> Axes:
    """Softmax keeps channels, but mixes those along its dimension."""
    axes = propagation.axes[first_input(node)]
    if axes[argument(node, "dim")] is not None:
        propagation.mixing.add(node)
    return axes


def _needs_two(node: Node) -> bool:
    """Return whether an operation divides by one value less than there are, as a variance does."""
    is_variance = operation_name(node).startswith(("var", "std"))
    correction = argument(node, "correction", argument(node, "unbiased", 1))
    return is_variance and correction not in (0, False)


def product(propagation: ChannelPropagation, node: Node) -> Any:
    """Products of feature maps, as in attention, freeze their inputs; their cost is counted.

    A product with a matrix that does not depend on the images is a linear layer (`products`).
    """
    propagation.count_product(node)
    return propagation.freeze_inputs(node, "multiplied by other feature maps, as in attention")
