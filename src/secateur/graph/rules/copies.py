"""Rules of operations that copy a value along a dimension, and of values made from a shape."""

from __future__ import annotations

import numpy as np
from torch.fx.node import Node

from secateur.graph.channel_ids import Axes, Count, Ids
from secateur.graph.network_graph import argument, first_input, position_of, shape_of
from secateur.graph.propagation import ChannelPropagation
from secateur.graph.rules.shapes import record_sizes

SPREAD = "one channel that is spread over others"


def expand(propagation: ChannelPropagation, node: Node) -> Axes:
    """Expanding repeats dimensions of size 1."""
    source = first_input(node)
    axes, before, after = propagation.axes[source], shape_of(source), shape_of(node)
    missing = len(after) - len(before)
    sizes = [1] * missing + list(before)
    result: list[Ids | None] = [*missing * [None], *axes]
    like = argument(node, "other")
    for dim, (old, new) in enumerate(zip(sizes, after, strict=True)):
        if old == 1 and new != 1:
            propagation.freeze((result[dim],), SPREAD)
            is_like = isinstance(like, Node)
            result[dim] = propagation.axes[like][dim] if is_like else _copies(propagation, new)
    index = position_of(node, "size")
    if index >= 0:
        record_sizes(propagation, node, index, tuple(result))
    return tuple(result)


def _copies(propagation: ChannelPropagation, size: int) -> Ids | None:
    """Return ids for a dimension that holds copies; None along the images."""
    is_batch = size % propagation.graph.images == 0
    return None if is_batch or size == 1 else propagation.new_copied_ids(int(size))


def filled(propagation: ChannelPropagation, node: Node) -> Axes:
    """A value made from a shape, such as zeros, is the same for every channel."""
    axes = tuple(_copies(propagation, size) for size in shape_of(node))
    record_sizes(propagation, node, position_of(node, "size"), axes)
    return axes


def repeat(propagation: ChannelPropagation, node: Node) -> Axes:
    """Repeating concatenates copies along each dimension."""
    source = first_input(node)
    axes, before = propagation.axes[source], list(shape_of(source))
    index = position_of(node, "repeats")
    counts = list(node.args[index])  # type: ignore[arg-type]
    counts = [1] * (len(axes) - len(counts)) + counts
    missing = len(counts) - len(axes)
    axes, before = (*(None for _ in range(missing)), *axes), [1] * missing + before
    if any(ids is not None and isinstance(n, Node) for ids, n in zip(axes, counts, strict=True)):
        return propagation.freeze_inputs(node, "repeated once for each image")  # type: ignore[no-any-return]
    result: list[Ids | None] = []
    copied: list[int] = []
    for dim, (ids, count) in enumerate(zip(axes, counts, strict=True)):
        if before[dim] == 1 and count != 1 and not isinstance(count, Node):
            propagation.freeze((ids,), SPREAD)
            result.append(_copies(propagation, count))
            copied += [dim] if result[-1] is not None else []
        else:
            result.append(None if ids is None else np.tile(ids, count))

    def resize(count: Count) -> dict[int, list[object]]:
        return {index: [count(result[d], n) if d in copied else n for d, n in enumerate(counts)]}

    if copied:
        propagation.resizes[node] = resize
    return tuple(result)
