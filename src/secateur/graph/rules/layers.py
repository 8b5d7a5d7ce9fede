"""Rules of layers: convolutions, linear layers, embeddings, and norms with parameters."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from torch.fx.node import Node

from secateur.graph.channel_ids import Axes, Consumer, Ids, Layer
from secateur.graph.module_state import owner_of
from secateur.graph.network_graph import (
    argument,
    first_input,
    operation_name,
    position_of,
    shape_of,
)
from secateur.graph.propagation import (
    ChannelPropagation,
    fixed_axes,
    positions_per_image,
)
from secateur.graph.weight_norm import WeightNorm

MIXED_POSITIONS = "convolved over as if they were positions"
FIXED_KERNEL = "read by a kernel of fixed size"
FIXED_GROUPS = "a grouped convolution over channels that can't be cut"
STATE = "the state of a recurrent layer"
NORM_OF_COMPUTED = "weight norm of a kernel that is computed itself"
COMPUTED = "a kernel that is computed from feature maps"


def _add_layer(
    propagation: ChannelPropagation,
    node: Node,
    weight: Node,
    positions: int,
    before: Axes,
    produced: Ids | None,
    filter_dim: int = 0,
) -> Layer:
    """Add a layer; `before` are the axes of its input before the channels: batch and positions."""
    source = propagation.kernel_source(weight)
    parameter = propagation.graph.tensor_names.get(source, "")
    is_normed = operation_name(weight) == "_weight_norm"
    position_channels = tuple(ids for ids in before if ids is not None)
    layer = Layer(
        name=owner_of(parameter) or parameter or node.name,
        weight=parameter,
        is_computed=weight is not source and not is_normed,
        produced=produced,
        filter_dim=filter_dim,
        positions=positions // math.prod(map(len, position_channels)),
        position_channels=position_channels,
        node=node,
        kernel_node=weight,
        kernel=propagation.axes[weight],
        shape=tuple(int(size) for size in shape_of(weight)),
    )
    propagation.layers.append(layer)
    return layer


def _add_consumer(propagation: ChannelPropagation, layer: Layer, dim: int) -> None:
    ids = propagation.axes[first_input(layer.node)][dim]
    if ids is not None:
        propagation.consumers.append(Consumer(layer.name, layer.node, dim, ids))


def _is_computed(propagation: ChannelPropagation, weight: Node) -> bool:
    return propagation.depends_on(weight, propagation.graph.image)


def _keep_whole(propagation: ChannelPropagation, weight: Node) -> None:
    """Freeze a kernel that is computed by an operation which needs all of it."""
    reason = propagation.why_kernel_is_whole(weight)
    if reason and any(ids is None for ids in propagation.axes[weight][:2]):
        shape = [int(size) for size in shape_of(weight)]
        propagation.axes[weight] = (
            *(propagation.new_frozen_ids(size, reason) for size in shape[:2]),
            *(None for _ in shape[2:]),
        )


def weight_norm(propagation: ChannelPropagation, node: Node) -> Axes:
    """Weight norm has a norm for each index along one dimension of its kernel, or one for all."""
    direction, magnitude = first_input(node), first_input(node, 1)
    names = [propagation.graph.tensor_names.get(source) for source in (direction, magnitude)]
    if names[0] is None or names[1] is None:
        return propagation.freeze_inputs(node, NORM_OF_COMPUTED)  # type: ignore[no-any-return]
    dim: int = argument(node, "dim", 0)
    axes = propagation.axes[direction]
    if dim >= 0:
        propagation.couple(axes[dim], propagation.axes[magnitude][dim], FIXED_KERNEL)
    propagation.weight_norms.append(WeightNorm(names[0], names[1], dim))
    return axes


def renorm(propagation: ChannelPropagation, node: Node) -> Axes:
    """Max-norm: a limit for the norm of each slice along one dimension, over all others."""
    axes, dim = propagation.axes[first_input(node)], argument(node, "dim")
    if any(ids is not None for d, ids in enumerate(axes) if d != dim % len(axes)):
        propagation.mixing.add(node)
    return axes


def convolution(propagation: ChannelPropagation, node: Node) -> Axes:
    """Convolutions sum over input channels, or those of each group; their filters are new ones."""
    images, weight = first_input(node), first_input(node, 1)
    if _is_computed(propagation, weight):
        propagation.count_product(node)
        return propagation.freeze_inputs(node, COMPUTED)  # type: ignore[no-any-return]
    _keep_whole(propagation, weight)
    groups = argument(node, "groups", 1)
    bias = argument(node, "bias")
    is_transposed = "transpose" in operation_name(node)
    shape, kernel = shape_of(node), propagation.axes[weight]
    channel_dim = len(shape) - len(kernel) + 1
    # A transposed convolution applies its kernel at each position of its input.
    applied = shape_of(images) if is_transposed else shape
    positions = positions_per_image(propagation, applied[:channel_dim], applied[channel_dim + 1 :])
    propagation.freeze(propagation.axes[images][channel_dim + 1 :], MIXED_POSITIONS)
    consumed = propagation.axes[images][channel_dim]
    inputs, outputs = (int(shape_of(value)[channel_dim]) for value in (images, node))
    cuts_whole_groups = groups > 1 and groups >= max(inputs, outputs) // groups
    if cuts_whole_groups:
        produced = _by_group(
            propagation, node, kernel, consumed, groups, is_transposed=is_transposed
        )
    else:
        produced = _within_groups(
            propagation, kernel, consumed, groups, is_transposed=is_transposed
        )
    filter_dim = 1 if is_transposed and not cuts_whole_groups else 0
    before = propagation.axes[images][:channel_dim]
    layer = _add_layer(propagation, node, weight, positions, before, produced, filter_dim)
    if not cuts_whole_groups:
        _add_consumer(propagation, layer, channel_dim)
    if isinstance(bias, Node):
        propagation.couple(produced, propagation.axes[bias][0], "added to a bias of fixed size")
    return (*before, produced, *(None for _ in shape[channel_dim + 1 :]))


def _by_group(
    propagation: ChannelPropagation,
    node: Node,
    kernel: Axes,
    consumed: Ids | None,
    groups: int,
    *,
    is_transposed: bool,
) -> Ids | None:
    """Return the produced channels if whole groups are cut, as in depthwise convolutions.

    Used if that leaves more to choose from than `_within_groups`.
    """
    propagation.freeze((kernel[1],), "a group of a convolution can only be cut as a whole")
    if kernel[0] is None:
        propagation.freeze((consumed,), FIXED_KERNEL)
        return None
    first = None if consumed is None else propagation.couple_rows(consumed.reshape(groups, -1))
    group = propagation.couple_rows(kernel[0].reshape(groups, -1))
    propagation.couple(first, group, FIXED_GROUPS)
    width = len(kernel[0]) // groups
    index = position_of(node, "groups")
    propagation.resizes[node] = lambda count: {index: count(kernel[0], 0) // width}
    if not is_transposed:
        return kernel[0]
    outputs_per_group = len(kernel[1]) if kernel[1] is not None else 1
    return np.repeat(group, outputs_per_group)


def _within_groups(
    propagation: ChannelPropagation,
    kernel: Axes,
    consumed: Ids | None,
    groups: int,
    *,
    is_transposed: bool,
) -> Ids | None:
    """Return the produced channels if every group (there may be one) keeps the same channels."""
    if is_transposed:
        inputs = _same_in_groups(propagation, kernel[0], groups)
        propagation.couple(_same_in_groups(propagation, consumed, groups), inputs, FIXED_KERNEL)
        return None if kernel[1] is None else np.tile(kernel[1], groups)
    reason = FIXED_KERNEL if groups == 1 else FIXED_GROUPS
    propagation.couple(_same_in_groups(propagation, consumed, groups), kernel[1], reason)
    _same_in_groups(propagation, kernel[0], groups)
    return kernel[0]


def _same_in_groups(propagation: ChannelPropagation, ids: Ids | None, groups: int) -> Ids | None:
    """Couple the groups channel by channel; return the ids of one group."""
    return None if ids is None else propagation.couple_rows(ids.reshape(groups, -1).T)


def linear(propagation: ChannelPropagation, node: Node) -> Axes:
    """Linear layers sum over the last dimension; filters are the new channels there."""
    inputs, weight = first_input(node), first_input(node, 1)
    bias = argument(node, "bias")
    if _is_computed(propagation, weight):
        propagation.count_product(node)
        return propagation.freeze_inputs(node, COMPUTED)  # type: ignore[no-any-return]
    _keep_whole(propagation, weight)
    before = propagation.axes[inputs][:-1]
    filters, columns = propagation.axes[weight]
    positions = positions_per_image(propagation, shape_of(node)[:-1])
    layer = _add_layer(propagation, node, weight, positions, before, filters)
    propagation.couple(propagation.axes[inputs][-1], columns, FIXED_KERNEL)
    _add_consumer(propagation, layer, len(shape_of(inputs)) - 1)
    if isinstance(bias, Node):
        propagation.couple(filters, propagation.axes[bias][0], "added to a bias of fixed size")
    return (*before, filters)


def deformable_convolution(propagation: ChannelPropagation, node: Node) -> Axes:
    """As a convolution; its offsets and its mask stay whole, as do groups that share offsets."""
    for name in ("offset", "mask"):
        propagation.freeze(propagation.axes[argument(node, name)], "places that a kernel reads")
    consumed = propagation.axes[first_input(node)][1]
    groups = argument(node, "offset_groups")
    if consumed is not None and groups > 1:
        propagation.couple_rows(consumed.reshape(groups, -1).T)
    return convolution(propagation, node)


def recurrent(propagation: ChannelPropagation, node: Node) -> list[Axes]:
    """RNN, LSTM and GRU: the channels they read can be cut; their state stays whole."""
    inputs, parameters = first_input(node), argument(node, "params")
    axes, state = propagation.axes[inputs], argument(node, "hx")
    propagation.freeze(axes[:-1], MIXED_POSITIONS)
    directions = 2 if argument(node, "bidirectional") else 1
    per_direction = len(parameters) // (argument(node, "num_layers") * directions)
    kernels = parameters[: per_direction * directions : per_direction]
    for source in (*parameters, *(state if isinstance(state, list | tuple) else (state,))):
        dims = propagation.axes[source]
        propagation.freeze(dims[:1] if source in kernels else dims, STATE)
    for kernel in kernels:
        propagation.couple(axes[-1], propagation.axes[kernel][1], FIXED_KERNEL)
    positions = positions_per_image(propagation, shape_of(inputs)[:-1])
    for source in parameters:
        if source not in kernels and len(shape_of(source)) == 2:
            propagation.product_macs += positions * math.prod(map(int, shape_of(source)))
    layer = _add_layer(propagation, node, kernels[0], positions, (), None)
    rows = sum(int(shape_of(kernel)[0]) for kernel in kernels)
    columns = propagation.axes[kernels[0]][1]
    propagation.layers[-1] = dataclasses.replace(
        layer, kernel=(None, columns), shape=(rows, int(shape_of(kernels[0])[1]))
    )
    _add_consumer(propagation, layer, len(axes) - 1)
    return fixed_axes(node)  # type: ignore[no-any-return]


def embedding(propagation: ChannelPropagation, node: Node) -> Axes:
    """Embeddings look up rows of a table, which hold channels."""
    table, index = first_input(node), first_input(node, 1)
    propagation.freeze(
        (propagation.axes[table][0], *propagation.axes[index]), "looked up by number"
    )
    return (*(None for _ in propagation.axes[index]), propagation.axes[table][1])


def prelu(propagation: ChannelPropagation, node: Node) -> Axes:
    """PReLU has a weight for each channel along dimension 1, or one for all."""
    axes, weights = propagation.axes[first_input(node)], first_input(node, 1)
    if int(shape_of(weights)[0]) > 1:
        propagation.couple(
            axes[1], propagation.axes[weights][0], "multiplied by weights of fixed size"
        )
    return axes


def channel_norm(propagation: ChannelPropagation, node: Node) -> Axes:
    """Batch and instance norm treat each channel by itself, unless other dimensions hold some."""
    axes = propagation.axes[first_input(node)]
    for source in node.args[1:5]:
        if isinstance(source, Node):
            propagation.couple(
                axes[1], propagation.axes[source][0], "normalised with values of fixed size"
            )
    uses_batch_statistics = argument(node, "training", argument(node, "use_input_stats", False))
    if uses_batch_statistics and any(ids is not None for ids in axes[2:]):
        propagation.mixing.add(node)
    return axes


def layer_norm(propagation: ChannelPropagation, node: Node) -> Axes:
    """Layer and RMS norm mix the channels along the last dimensions."""
    axes = propagation.axes[first_input(node)]
    shape = list(argument(node, "normalized_shape"))
    last = axes[len(axes) - len(shape) :]
    for name in ("weight", "bias"):
        source = argument(node, name)
        if isinstance(source, Node):
            for ids, other in zip(last, propagation.axes[source], strict=True):
                propagation.couple(ids, other, "normalised together with a dimension of fixed size")
    if any(ids is not None for ids in last):
        propagation.mixing.add(node)
        index = position_of(node, "normalized_shape")
        propagation.resizes[node] = lambda count: {
            index: [count(ids, size) for ids, size in zip(last, shape, strict=True)]
        }
    return axes


def group_norm(propagation: ChannelPropagation, node: Node) -> Axes:
    """Group norm: whole groups are cut, or the same channels of each."""
    axes = propagation.axes[first_input(node)]
    ids = axes[1]
    for name in ("weight", "bias"):
        source = argument(node, name)
        if isinstance(source, Node):
            propagation.couple(
                ids, propagation.axes[source][0], "normalised with values of fixed size"
            )
    if ids is None:
        return axes
    groups = argument(node, "num_groups")
    width = len(ids) // groups
    if groups > 1 and groups >= width:
        propagation.couple_rows(ids.reshape(groups, width))
        index = position_of(node, "num_groups")
        propagation.resizes[node] = lambda count: {index: count(ids, len(ids)) // width}
    else:
        propagation.couple_rows(ids.reshape(groups, width).T)
        propagation.mixing.add(node)
    return axes
