"""Taps, where a group's feature maps are read, and the weights around each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int, Num
from torch import Tensor
from torch.fx.node import Node

from secateur.graph.channel_ids import Ids, Layer
from secateur.graph.dependency import DependencyGraph
from secateur.graph.groups import Group, Tap
from secateur.graph.interpreter import value_of
from secateur.graph.network_graph import Tensors, argument, operation_name
from secateur.graph.patches import Window, window_of
from secateur.runtime.device import CPU

UNCHANGED = 1e-6
"""How far from 1 the scale of a norm that changes nothing may be, by rounding."""


@dataclass(frozen=True, eq=False)
class ConsumerKernel:
    """The kernel of a layer that consumes a tap's filters."""

    window: Window
    """How the kernel moves; 1×1 where the layer is not a plain convolution."""
    weights: Float[Tensor, "output offset filter"]
    """Zero for filters that the layer does not read."""


@dataclass(frozen=True, eq=False)
class Kernels:
    """The weights around a tap's filters."""

    incoming: tuple[tuple[Float[Tensor, "_ ..."], Int[Tensor, "_"]], ...]
    """For each producer: its kernels, and the channel of the group that each produces."""
    channel: Int[Tensor, "filter"]
    """Channel of the group that each filter belongs to: mostly its index."""
    consumers: tuple[ConsumerKernel, ...]
    norm_scales: tuple[tuple[Float[Tensor, "_"], Int[Tensor, "_"]], ...]
    """For each batch norm before the tap: its scales, and the channel that each belongs to."""
    is_rescaled: bool = True
    """False if no batch norm before the tap changes the scale of anything, as where norms were
    folded into the kernels and put back."""
    device: torch.device = CPU
    """Where the weights are, and the feature maps that observers see: sums belong there, too."""

    @property
    def filters(self) -> int:
        """The number of filters."""
        return len(self.channel)

    @property
    def outgoing_norm(self) -> Float[Tensor, "filter"]:
        """Euclidean norm of all weights that consume each filter, in float64."""
        squares = torch.zeros(self.filters, dtype=torch.float64, device=self.device)
        for consumer in self.consumers:
            norm = torch.linalg.vector_norm(consumer.weights, dim=(0, 1), dtype=torch.float64)
            squares += norm.square()
        return squares.sqrt()


def taps_of(group: Group) -> dict[str, Tap]:
    """Return the taps of a group by the name that observers know each by."""
    return {
        group.name if number == 0 else f"{group.name} (part {number + 1})": tap
        for number, tap in enumerate(group.taps)
    }


def all_taps(dependencies: DependencyGraph) -> dict[str, Tap]:
    """Return the taps of all groups by name."""
    return {
        name: tap for group in dependencies.groups.values() for name, tap in taps_of(group).items()
    }


def maps_of(tap: Tap, value: Tensor) -> Tensor:
    """Return a tap's feature maps, `[image, filter, h, w]`, from the value of its node."""
    maps = as_maps(value.movedim(tap.dim, 1))
    if len(tap.index) == maps.shape[1]:
        return maps
    return maps[:, torch.from_numpy(tap.index)]


def as_maps(value: Num[Tensor, "image filter ..."]) -> Num[Tensor, "image filter h w"]:
    """Return a value as maps: 1×1 of linear layers, and a column of those of signals."""
    sides = value.shape[2:]
    height = sides[0] if len(sides) else 1
    return value.reshape(*value.shape[:2], height, math.prod(sides[1:]))


def kernels_of(dependencies: DependencyGraph, state: Tensors) -> dict[str, Kernels]:
    """Return the weights that produce and consume the filters of each tap, by its name."""
    device = next((tensor.device for tensor in state.values()), CPU)
    slots = {(slot.tensor, slot.dim): slot.channels for slot in dependencies.slots}
    layer_kernels = _layer_kernels(dependencies, state)
    scales = {
        dependencies.graph.tensor_names[node.args[1]]
        for node in dependencies.graph.nodes
        if operation_name(node) == "batch_norm" and isinstance(node.args[1], Node)
    }

    def produced_by(layer: Layer) -> Ids | None:
        ids = layer.kernel[layer.filter_dim]
        return None if ids is None else dependencies.channel_of[ids]

    rescaling = {
        dependencies.graph.tensor_names[node.args[1]]
        for node in dependencies.graph.nodes
        if operation_name(node) == "batch_norm"
        and isinstance(node.args[1], Node)
        and _rescales(dependencies, state, node)
    }
    kernels: dict[str, Kernels] = {}
    for group in dependencies.groups.values():
        # The channel of the group at each channel of the network; the last entry stands for -1.
        position = dependencies.index_table(group.channels)

        def rows_of(
            tensor: Tensor,
            dim: int,
            channels: Ids | None,
            position: npt.NDArray[np.int64] = position,
        ) -> tuple[Tensor, Tensor]:
            """Return the rows of a tensor that belong to the group, and the channel of each."""
            numbers = np.full(0, -1) if channels is None else position[channels]
            rows = torch.from_numpy(np.flatnonzero(numbers >= 0))
            return tensor.movedim(dim, 0)[rows], torch.from_numpy(numbers[numbers >= 0])

        incoming = [
            rows_of(layer_kernels[layer], layer.filter_dim, produced_by(layer))
            for layer in group.layers
            if layer in layer_kernels
        ]
        norms = {name: rows_of(state[name], 0, slots.get((name, 0))) for name in sorted(scales)}
        consumers = _consumer_kernels(dependencies, layer_kernels, position, len(group))
        for name, tap in taps_of(group).items():
            channel = torch.from_numpy(tap.channel)
            kernels[name] = Kernels(
                incoming=tuple(rows for rows in incoming if len(rows[1])),
                channel=channel,
                consumers=tuple(
                    ConsumerKernel(
                        window,
                        weights if _is_identity(channel, len(group)) else weights[:, :, channel],
                    )
                    for window, weights in consumers
                ),
                norm_scales=tuple(rows for rows in norms.values() if len(rows[1])),
                is_rescaled=any(len(norms[name][1]) for name in rescaling),
                device=device,
            )
    return kernels


def _layer_kernels(dependencies: DependencyGraph, state: Tensors) -> dict[Layer, Tensor]:
    """Return the kernel of each layer; those that are computed from parameters as they come out."""
    graph = dependencies.graph
    return {
        layer: state[layer.weight]
        if layer.kernel_node in graph.tensor_names
        else value_of(graph, layer.kernel_node, state)
        for layer in dependencies.layers
        if layer.weight in state
    }


def _rescales(dependencies: DependencyGraph, state: Tensors, norm: Node) -> bool:
    """Return whether a batch norm multiplies any channel by anything but 1."""
    names, (weight, variance) = dependencies.graph.tensor_names, (norm.args[1], norm.args[4])
    if not isinstance(weight, Node) or not isinstance(variance, Node):
        return True
    if weight not in names or variance not in names:
        return True
    epsilon = norm.args[7]
    assert isinstance(epsilon, float)
    scale = state[names[weight]] * (state[names[variance]] + epsilon).rsqrt()
    return bool(((scale - 1).abs() > UNCHANGED).any())


def _consumer_kernels(
    dependencies: DependencyGraph,
    layer_kernels: dict[Layer, Tensor],
    position: npt.NDArray[np.int64],
    channels: int,
) -> list[tuple[Window, Tensor]]:
    """Return the window and the weights, `[output, offset, channel]`, of each consumer of a group.

    `position` gives the group's channel for each channel of the network, -1 if there is none.
    """
    kernels: list[tuple[Window, Tensor]] = []
    for layer, kernel in layer_kernels.items():
        read = layer.kernel[1 - layer.filter_dim]
        if read is None or len(read) == 1:
            continue
        read_channels = position[dependencies.channel_of[read]]
        inputs = torch.from_numpy(np.flatnonzero(read_channels >= 0))
        if not len(inputs):
            continue
        channel = torch.from_numpy(read_channels[read_channels >= 0])
        kernels.append(_weights_by_channel(layer, kernel, inputs, channel, channels))
    return kernels


def _weights_by_channel(
    layer: Layer, weight: Tensor, inputs: Tensor, channel: Tensor, channels: int
) -> tuple[Window, Tensor]:
    """Return a consumer's window and weights, `[output, offset, channel]`.

    `inputs` are the inputs that read the group, and `channel` is the channel that each reads.
    """
    kernel = weight.movedim((layer.filter_dim, 1 - layer.filter_dim), (0, -1))
    kernel = kernel.flatten(1, -2) if kernel.ndim > 2 else kernel[:, None]
    if operation_name(layer.node) == "conv2d" and argument(layer.node, "groups", 1) == 1:
        window = window_of(layer.node, tuple(weight.shape[2:]))
        if _is_identity(inputs, kernel.shape[2]) and _is_identity(channel, channels):
            return window, kernel
        weights = kernel.new_zeros(*kernel.shape[:2], channels)
        weights[:, :, channel] = kernel[:, :, inputs]
        return window, weights
    # Each position that a linear layer reads, and each offset, counts as an output.
    order = channel.argsort(stable=True)
    times = channel.bincount(minlength=channels)
    turn = torch.arange(len(order)) - (times.cumsum(0) - times).repeat_interleave(times)
    table = kernel.new_zeros(*kernel.shape[:2], int(times.max()), channels)
    table[:, :, turn, channel[order]] = kernel[:, :, inputs[order]]
    return Window((1, 1)), table.flatten(0, 2)[:, None]


def _is_identity(index: Tensor, length: int) -> bool:
    """Return whether `index` counts from 0 to `length` - 1: then nothing need be copied."""
    return torch.equal(index, torch.arange(length))
