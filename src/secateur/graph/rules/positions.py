"""Rules of operations along some dimensions: each holds positions, or channels that must stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import Node

from secateur.graph.channel_ids import Axes, Count, Ids
from secateur.graph.network_graph import (
    argument,
    first_input,
    position_of,
    schema_of_node,
    shape_of,
)
from secateur.graph.propagation import ChannelPropagation, Rule

BY_NUMBER = "the order or the number of the channels matters"
WRITTEN = "written together with a value of fixed size"


def along(*names: str, keeps: Callable[[Node], bool] = lambda node: True) -> Rule:
    """Return the rule of an operation along the dimensions in these arguments, or along all.

    Such an operation depends on the order, or on the number, of what lies along them.
    """

    def rule(propagation: ChannelPropagation, node: Node) -> Any:
        axes = propagation.axes[first_input(node)]
        dims = _dims(node, names, len(axes))
        axes = _fixed(propagation, axes, dims)
        if not keeps(node):
            axes = tuple(ids for dim, ids in enumerate(axes) if dim not in dims)
        value: Any = node.meta["val"]
        return axes if isinstance(value, Tensor) else [axes] * len(value)

    return rule


def keeps_dimensions(node: Node) -> bool:
    """Return whether a reduction leaves dimensions of size 1."""
    return bool(argument(node, "keepdim", False))


def _dims(node: Node, names: Iterable[str], rank: int) -> set[int]:
    dims: list[int] = []
    for name in names:
        value = argument(node, name, _default(node, name))
        dims += value if isinstance(value, list | tuple) else [] if value is None else [value]
    return {dim % rank for dim in dims} if dims else set(range(rank))


def _default(node: Node, name: str) -> Any:
    index = position_of(node, name)
    return schema_of_node(node).arguments[index].default_value if index >= 0 else None


def _fixed(propagation: ChannelPropagation, axes: Axes, dims: Iterable[int]) -> Axes:
    """Freeze the channels along some dimensions; return axes of fixed size there."""
    dims = set(dims)
    propagation.freeze((axes[dim] for dim in dims), BY_NUMBER)
    return tuple(None if dim in dims else ids for dim, ids in enumerate(axes))


def flip(propagation: ChannelPropagation, node: Node) -> Axes:
    """Flipping turns the order of channels round."""
    axes = propagation.axes[first_input(node)]
    dims = {dim % len(axes) for dim in argument(node, "dims")}
    return tuple(
        ids[::-1].copy() if ids is not None and dim in dims else ids for dim, ids in enumerate(axes)
    )


def rotate(propagation: ChannelPropagation, node: Node) -> Axes:
    """Turning by 90 degrees mixes two dimensions, which both hold positions."""
    one, other = (dim % len(shape_of(node)) for dim in argument(node, "dims", (0, 1)))
    return _fixed(propagation, propagation.axes[first_input(node)], (one, other))


def triangle(propagation: ChannelPropagation, node: Node) -> Axes:
    """`tril` and `triu` work on the last two dimensions."""
    axes = propagation.axes[first_input(node)]
    return _fixed(propagation, axes, (len(axes) - 2, len(axes) - 1))


def diagonal(propagation: ChannelPropagation, node: Node) -> Axes:
    """A diagonal takes two dimensions away and adds one at the end."""
    axes = propagation.axes[first_input(node)]
    dims = {argument(node, "dim1", 0) % len(axes), argument(node, "dim2", 1) % len(axes)}
    axes = _fixed(propagation, axes, dims)
    return (*(ids for dim, ids in enumerate(axes) if dim not in dims), None)


def embed_diagonal(propagation: ChannelPropagation, node: Node) -> Axes:
    """Matrices of which the last dimension becomes the diagonal."""
    *axes, last = propagation.axes[first_input(node)]
    propagation.freeze((last,), BY_NUMBER)
    rank = len(axes) + 2
    dims = {argument(node, "dim1", -2) % rank, argument(node, "dim2", -1) % rank}
    others = iter(axes)
    return tuple(None if dim in dims else next(others) for dim in range(rank))


def gather(propagation: ChannelPropagation, node: Node) -> Axes:
    """Gathers what an index says along one dimension; the others go side by side."""
    source = first_input(node)
    axes, before, after = propagation.axes[source], shape_of(source), shape_of(node)
    dim = argument(node, "dim") % max(len(axes), 1)
    _side_by_side(propagation, node, dim)
    return tuple(ids if d != dim and before[d] == after[d] else None for d, ids in enumerate(axes))


def scatter(propagation: ChannelPropagation, node: Node) -> Axes:
    """Writes where an index says along one dimension; the others go side by side."""
    axes = propagation.axes[first_input(node)]
    dim = argument(node, "dim") % max(len(axes), 1)
    _side_by_side(propagation, node, dim)
    return _fixed(propagation, axes, (dim,))


def _side_by_side(propagation: ChannelPropagation, node: Node, dim: int) -> None:
    """Couple all inputs of an operation but along one dimension, where channels must stay."""
    first = first_input(node)
    for source in node.all_input_nodes:
        axes = propagation.axes.get(source, ())
        if len(axes) != len(propagation.axes[first]):
            propagation.freeze(axes, BY_NUMBER)
            continue
        for d, ids in enumerate(axes):
            if d == dim:
                propagation.freeze((ids,), BY_NUMBER)
            elif source is not first and shape_of(source)[d] == shape_of(first)[d]:
                propagation.couple(propagation.axes[first][d], ids, WRITTEN)
            elif source is not first:  # only some of the channels
                propagation.freeze((propagation.axes[first][d], ids), BY_NUMBER)


def index_select(propagation: ChannelPropagation, node: Node) -> Axes:
    """Picks what an index says along one dimension."""
    axes = propagation.axes[first_input(node)]
    propagation.freeze(propagation.axes[first_input(node, 2)], BY_NUMBER)
    return _fixed(propagation, axes, (argument(node, "dim") % len(axes),))


def index_write(propagation: ChannelPropagation, node: Node) -> Axes:
    """Writes or adds values at places along one dimension that an index names."""
    axes = propagation.axes[first_input(node)]
    dim = argument(node, "dim") % len(axes)
    propagation.freeze(propagation.axes[argument(node, "index")], BY_NUMBER)
    source = argument(node, "source")
    if isinstance(source, Node):
        for d, (one, other) in enumerate(zip(axes, propagation.axes[source], strict=True)):
            if d == dim:
                propagation.freeze((other,), BY_NUMBER)
            else:
                propagation.couple(one, other, WRITTEN)
    return _fixed(propagation, axes, (dim,))


def index(propagation: ChannelPropagation, node: Node) -> Axes:
    """Indexing with lists or tensors: dimensions that are not indexed keep their channels."""
    axes = propagation.axes[first_input(node)]
    dims: list[int] = []
    dim = 0
    for item in argument(node, "indices"):
        width = 1
        if item is not None:
            width = len(shape_of(item)) if _is_mask(item) else 1
            propagation.freeze(propagation.axes[item], BY_NUMBER)
            dims += range(dim, dim + width)
        dim += width
    axes = _fixed(propagation, axes, dims)
    new = len(shape_of(node)) - (len(axes) - len(dims))
    kept = [ids for dim, ids in enumerate(axes) if dim not in dims]
    is_joined = dims == list(range(dims[0], dims[-1] + 1))
    first = dims[0] if is_joined else 0
    return (*kept[:first], *(None for _ in range(new)), *kept[first:])


def _is_mask(item: Node | None) -> bool:
    return item is not None and item.meta["val"].dtype in (torch.bool, torch.uint8)


def index_put(propagation: ChannelPropagation, node: Node) -> Axes:
    """Writes at places that lists or a mask name: a mask goes with the channels that it covers."""
    axes = propagation.axes[first_input(node)]
    values, indices = argument(node, "values"), list(argument(node, "indices"))
    dim = 0
    for item in indices:
        if item is None:
            dim += 1
        elif _is_mask(item):
            for ids in propagation.axes[item]:
                propagation.couple(axes[dim], ids, WRITTEN)
                dim += 1
        else:
            propagation.freeze((axes[dim], *propagation.axes[item]), BY_NUMBER)
            dim += 1
    if math.prod(shape_of(values)) != 1:
        propagation.freeze((*axes, *propagation.axes[values]), WRITTEN)
    return axes


def slice_scatter(propagation: ChannelPropagation, node: Node) -> Axes:
    """Writes into a range of one dimension."""
    axes, source = propagation.axes[first_input(node)], propagation.axes[first_input(node, 1)]
    dim = argument(node, "dim", 0) % len(axes)
    ids = axes[dim]
    for d in range(len(axes)):
        if d != dim:
            propagation.couple(axes[d], source[d], WRITTEN)
    if ids is None:
        propagation.freeze((source[dim],), WRITTEN)
        return axes
    bounds = argument(node, "start"), argument(node, "end"), argument(node, "step", 1)
    start, end, step = slice(*bounds).indices(len(ids))
    if step != 1:
        propagation.freeze((ids, source[dim]), "every n-th channel, in the network's code")
        return axes
    head, chosen = ids[:start], ids[start:end]
    propagation.couple(chosen, source[dim], WRITTEN)
    propagation.covers.append(chosen)

    def resize(count: Count) -> dict[int, int]:
        first = count(head, start)
        return {
            position_of(node, "start"): first,
            position_of(node, "end"): first + count(chosen, end - start),
        }

    if (start, end) != (0, len(ids)):
        propagation.resizes[node] = resize
    return axes


def select_scatter(propagation: ChannelPropagation, node: Node) -> Axes:
    """Writes at one index of a dimension, or along a diagonal, which must stay."""
    axes, source = propagation.axes[first_input(node)], propagation.axes[first_input(node, 1)]
    if position_of(node, "dim1") >= 0:
        dims = {argument(node, "dim1", 0) % len(axes), argument(node, "dim2", 1) % len(axes)}
        source = source[:-1]
    else:
        dims = {argument(node, "dim") % len(axes)}
    kept: Sequence[Ids | None] = [ids for dim, ids in enumerate(axes) if dim not in dims]
    for one, other in zip(kept, source, strict=True):
        propagation.couple(one, other, WRITTEN)
    return _fixed(propagation, axes, dims)


def unpool(propagation: ChannelPropagation, node: Node) -> Axes:
    """Max unpooling writes each value where an index says, channel by channel."""
    axes, index = propagation.axes[first_input(node)], propagation.axes[first_input(node, 1)]
    for one, other in zip(axes[:2], index[:2], strict=True):
        propagation.couple(one, other, WRITTEN)
    propagation.freeze((*axes[2:], *index[2:]), "pooled over as if they were positions")
    return (*axes[:2], *(None for _ in axes[2:]))


def complex_parts(propagation: ChannelPropagation, node: Node) -> Axes:
    """A complex number as two real ones along a new last dimension."""
    return (*propagation.axes[first_input(node)], None)


def complex_number(propagation: ChannelPropagation, node: Node) -> Axes:
    """Two real numbers along the last dimension as a complex one."""
    *axes, last = propagation.axes[first_input(node)]
    propagation.freeze((last,), BY_NUMBER)
    return tuple(axes)
