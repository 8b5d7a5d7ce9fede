"""Rules of layers: convolutions, linear layers, embeddings, norms with parameters."""

from __future__ import annotations

import math

import numpy as np
from torch.fx.node import Node

from secateur.graph.channel_ids import Axes, Consumer, Ids, Layer
from secateur.graph.network_graph import argument, first_input, position_of, shape_of
from secateur.graph.propagation import ChannelPropagation, positions

MIXED_POSITIONS = "convolved over as if they were positions"
FIXED_KERNEL = "read by a kernel of fixed size"
FIXED_GROUPS = "a grouped convolution over channels that can't be cut"
COMPUTED = "a kernel that is computed from feature maps"


def _add_layer(
    spread: ChannelPropagation,
    node: Node,
    weight: Node,
    places: int,
    before: Axes,
    written: Ids | None,
    filter_dim: int = 0,
) -> Layer:
    source = weight
    while source not in spread.graph.tensor_names and source.all_input_nodes:
        source = source.all_input_nodes[0]
    parameter = spread.graph.tensor_names.get(source, "")
    over = tuple(ids for ids in before if ids is not None)
    layer = Layer(
        name=parameter.rpartition(".")[0] or parameter or node.name,
        weight=parameter,
        is_computed=weight is not source,
        produced=written,
        filter_dim=filter_dim,
        positions=places // math.prod(map(len, over)),
        over=over,
        node=node,
        kernel=spread.axes[weight],
        shape=tuple(int(size) for size in shape_of(weight)),
    )
    spread.layers.append(layer)
    return layer


def _add_consumer(spread: ChannelPropagation, layer: Layer, dim: int) -> None:
    ids = spread.axes[first_input(layer.node)][dim]
    if ids is not None:
        spread.readers.append(Consumer(layer.name, layer.node, dim, ids))


def _is_computed(spread: ChannelPropagation, weight: Node) -> bool:
    return spread.depends_on(weight, spread.graph.image)


def convolution(spread: ChannelPropagation, node: Node) -> Axes:
    """Sums over input channels, or over those of each group; writes its filters."""
    images, weight = first_input(node), first_input(node, 1)
    if _is_computed(spread, weight):
        spread.count_product(node)
        return spread.refuse(node, COMPUTED)  # type: ignore[no-any-return]
    groups = argument(node, "groups", 1)
    bias = argument(node, "bias")
    is_transposed = "transpose" in node.target._schema.name  # type: ignore[union-attr]
    shape, kernel = shape_of(node), spread.axes[weight]
    channel_dim = len(shape) - len(kernel) + 1
    counted = shape_of(images) if is_transposed else shape
    places = positions(spread, counted[:channel_dim], counted[channel_dim + 1 :])
    spread.freeze(spread.axes[images][channel_dim + 1 :], MIXED_POSITIONS)
    read = spread.axes[images][channel_dim]
    inputs, outputs = (int(shape_of(each)[channel_dim]) for each in (images, node))
    by_group = groups > 1 and groups >= max(inputs, outputs) // groups
    if by_group:
        written = _by_group(spread, node, kernel, read, groups, is_transposed=is_transposed)
    else:
        written = _within_groups(spread, kernel, read, groups, is_transposed=is_transposed)
    filter_dim = 1 if is_transposed and not by_group else 0
    before = spread.axes[images][:channel_dim]
    layer = _add_layer(spread, node, weight, places, before, written, filter_dim)
    if not by_group:
        _add_consumer(spread, layer, channel_dim)
    if isinstance(bias, Node):
        spread.tie(written, spread.axes[bias][0], "added to a bias of fixed size")
    return (*before, written, *(None for _ in shape[channel_dim + 1 :]))


def _by_group(
    spread: ChannelPropagation,
    node: Node,
    kernel: Axes,
    read: Ids | None,
    groups: int,
    *,
    is_transposed: bool,
) -> Ids | None:
    """Channels written where whole groups go, as in depthwise convolutions.

    Chosen where it leaves more to choose from than `_within_groups`.
    """
    spread.freeze((kernel[1],), "a group of a convolution goes as a whole")
    if kernel[0] is None:
        spread.freeze((read,), FIXED_KERNEL)
        return None
    first = None if read is None else spread.tie_rows(read.reshape(groups, -1))
    group = spread.tie_rows(kernel[0].reshape(groups, -1))
    spread.tie(first, group, FIXED_GROUPS)
    width = len(kernel[0]) // groups
    index = position_of(node, "groups")
    spread.resizes[node] = lambda count: {index: count(kernel[0], 0) // width}
    if not is_transposed:
        return kernel[0]
    outputs_a_group = len(kernel[1]) if kernel[1] is not None else 1
    return np.repeat(group, outputs_a_group)


def _within_groups(
    spread: ChannelPropagation, kernel: Axes, read: Ids | None, groups: int, *, is_transposed: bool
) -> Ids | None:
    """Channels written where every group, of one or more, keeps the same of its channels."""
    if is_transposed:
        inputs = _same_in_groups(spread, kernel[0], groups)
        spread.tie(_same_in_groups(spread, read, groups), inputs, FIXED_KERNEL)
        return None if kernel[1] is None else np.tile(kernel[1], groups)
    reason = FIXED_KERNEL if groups == 1 else FIXED_GROUPS
    spread.tie(_same_in_groups(spread, read, groups), kernel[1], reason)
    _same_in_groups(spread, kernel[0], groups)
    return kernel[0]


def _same_in_groups(spread: ChannelPropagation, ids: Ids | None, groups: int) -> Ids | None:
    """States that all groups hold the same channels by their number in the group; of one group."""
    return None if ids is None else spread.tie_rows(ids.reshape(groups, -1).T)


def linear(spread: ChannelPropagation, node: Node) -> Axes:
    """Sums over the last dimension; writes its filters there."""
    inputs, weight = first_input(node), first_input(node, 1)
    bias = argument(node, "bias")
    if _is_computed(spread, weight):
        spread.count_product(node)
        return spread.refuse(node, COMPUTED)  # type: ignore[no-any-return]
    before = spread.axes[inputs][:-1]
    filters, read = spread.axes[weight]
    places = positions(spread, shape_of(node)[:-1])
    layer = _add_layer(spread, node, weight, places, before, filters)
    spread.tie(spread.axes[inputs][-1], read, FIXED_KERNEL)
    _add_consumer(spread, layer, len(shape_of(inputs)) - 1)
    if isinstance(bias, Node):
        spread.tie(filters, spread.axes[bias][0], "added to a bias of fixed size")
    return (*before, filters)


def embedding(spread: ChannelPropagation, node: Node) -> Axes:
    """Rows of a table, which hold channels."""
    table, index = first_input(node), first_input(node, 1)
    spread.freeze((spread.axes[table][0], *spread.axes[index]), "looked up by number")
    return (*(None for _ in spread.axes[index]), spread.axes[table][1])


def prelu(spread: ChannelPropagation, node: Node) -> Axes:
    """A slope for each channel along dimension 1, or one for all."""
    axes, slopes = spread.axes[first_input(node)], first_input(node, 1)
    if int(shape_of(slopes)[0]) > 1:
        spread.tie(axes[1], spread.axes[slopes][0], "multiplied by slopes of fixed size")
    return axes


def channel_norm(spread: ChannelPropagation, node: Node) -> Axes:
    """Batch and instance norm: each channel by itself, unless other dimensions hold channels."""
    axes = spread.axes[first_input(node)]
    for source in node.args[1:5]:
        if isinstance(source, Node):
            spread.tie(axes[1], spread.axes[source][0], "normalised with values of fixed size")
    own_statistics = argument(node, "training", argument(node, "use_input_stats", False))
    if own_statistics and any(ids is not None for ids in axes[2:]):
        spread.mixing.add(node)
    return axes


def layer_norm(spread: ChannelPropagation, node: Node) -> Axes:
    """Layer and RMS norm: statistics over the last dimensions."""
    axes = spread.axes[first_input(node)]
    shape = list(argument(node, "normalized_shape"))
    last = axes[len(axes) - len(shape) :]
    for name in ("weight", "bias"):
        source = argument(node, name)
        if isinstance(source, Node):
            for ids, other in zip(last, spread.axes[source], strict=True):
                spread.tie(ids, other, "normalised together with a dimension of fixed size")
    if any(ids is not None for ids in last):
        spread.mixing.add(node)
        index = position_of(node, "normalized_shape")
        spread.resizes[node] = lambda count: {
            index: [count(ids, size) for ids, size in zip(last, shape, strict=True)]
        }
    return axes


def group_norm(spread: ChannelPropagation, node: Node) -> Axes:
    """Statistics over the channels of each group: whole groups go, or the same of each."""
    axes = spread.axes[first_input(node)]
    ids = axes[1]
    for name in ("weight", "bias"):
        source = argument(node, name)
        if isinstance(source, Node):
            spread.tie(ids, spread.axes[source][0], "normalised with values of fixed size")
    if ids is None:
        return axes
    groups = argument(node, "num_groups")
    width = len(ids) // groups
    if groups > 1 and groups >= width:
        spread.tie_rows(ids.reshape(groups, width))
        index = position_of(node, "num_groups")
        spread.resizes[node] = lambda count: {index: count(ids, len(ids)) // width}
    else:
        spread.tie_rows(ids.reshape(groups, width).T)
        spread.mixing.add(node)
    return axes
