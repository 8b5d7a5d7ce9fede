"""Memory of a network's activations during a forward pass, in the order of execution.

How much memory is free is measured by `secateur.runtime.memory`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.fx.node import Node

from secateur.graph.channel_ids import Axes
from secateur.graph.dependency import DependencyGraph, Removed
from secateur.graph.network_graph import gives_its_input, is_view
from secateur.graph.tensor_sizes import Dimension, TensorSizes, dimensions_of


@dataclass(frozen=True, eq=False)
class Storage:
    """The memory of a tensor and of all views of it."""

    node: Node
    """The operation that writes it, or the placeholder of the images."""
    dimensions: tuple[Dimension, ...]
    images: int
    """How many images the dimensions cover; 1 if they don't depend on the batch."""
    element_bytes: int
    first: int
    """Position of `node` in the order of execution."""
    last: int
    """Position of the last operation that reads it; the end of the graph for an output."""


def storages(dependencies: DependencyGraph) -> list[Storage]:
    """Return the storages of the images and of all activations.

    Parameters, buffers and constants are left out. An in-place operation counts as a storage of its
    own, as it does in the graph.
    """
    graph = dependencies.graph
    position = {node: number for number, node in enumerate(graph.nodes)}
    result: list[Storage] = []
    at: dict[Node, list[int | None]] = {}
    """Place in `result` of each value of a node; None for parameters and views of them."""

    def add(node: Node, value: Any, axes: Axes) -> int | None:
        if not isinstance(value, Tensor):
            return None
        shape = tuple(int(size) for size in value.shape)
        images = graph.images if any(s and s % graph.images == 0 for s in shape) else 1
        dimensions = dimensions_of(dependencies.channel_of, axes, shape)
        place = position[node]
        result.append(Storage(node, dimensions, images, value.dtype.itemsize, place, place))
        return len(result) - 1

    for node in graph.nodes:
        value = node.meta.get("val")
        if node is not graph.image and node.op != "call_function":
            at[node] = [None]
        elif node.target is operator.getitem:
            source, index = node.args
            assert isinstance(source, Node)
            assert isinstance(index, int)
            at[node] = [at[source][index]]
        elif _shares_memory(node):
            source = node.args[0]
            assert isinstance(source, Node)
            at[node] = at[source] * (len(value) if isinstance(value, list | tuple) else 1)
        elif isinstance(value, list | tuple):
            several = dependencies.multi_output_axes.get(node, [])
            at[node] = [add(node, v, axes) for v, axes in zip(value, several, strict=True)]
        else:
            at[node] = [add(node, value, dependencies.axes.get(node, ()))]
        used = graph.last_use.get(node, node)
        last = len(graph.nodes) if node in graph.outputs else position[used]
        for place in at[node]:
            if place is not None:
                result[place] = replace(result[place], last=max(result[place].last, last))
    return result


def peak_bytes(dependencies: DependencyGraph) -> Callable[[Removed], float]:
    """Return a function of the removed channels: peak bytes of activations, for one image."""
    alive = alive_bytes(dependencies)
    return lambda removed: float(alive(removed).max())


def total_bytes(dependencies: DependencyGraph) -> int:
    """Return the bytes of all activations, for one image: what a pass with gradients holds."""
    activations = storages(dependencies)
    dimensions = [storage.dimensions for storage in activations]
    elements = TensorSizes(dependencies.groups, dimensions)({}).tolist()
    return sum(
        count * storage.element_bytes // storage.images
        for count, storage in zip(elements, activations, strict=True)
    )


def count_other_values(dependencies: DependencyGraph) -> Callable[[Removed], float]:
    """Return a function of the removed channels: values written for an image, except by layers."""
    layers = {layer.node for layer in dependencies.layers} | {dependencies.graph.image}
    others = [storage for storage in storages(dependencies) if storage.node not in layers]
    sizes = TensorSizes(dependencies.groups, [storage.dimensions for storage in others])
    images = np.array([storage.images for storage in others], dtype=np.int64)
    return lambda removed: float((sizes(removed) // images).sum())


def alive_bytes(dependencies: DependencyGraph) -> Callable[[Removed], npt.NDArray[np.float64]]:
    """Return a function of the removed channels: live bytes at each moment, for one image.

    A tensor is alive from the operation that writes it to the last one that reads it. Memory that
    an operation needs internally is not counted.
    """
    activations = storages(dependencies)
    elements = TensorSizes(dependencies.groups, [storage.dimensions for storage in activations])
    element_bytes = np.array([storage.element_bytes for storage in activations])
    images = np.array([storage.images for storage in activations])
    first = np.array([storage.first for storage in activations])
    after = np.array([storage.last + 1 for storage in activations])
    moments = len(dependencies.graph.nodes) + 2

    def alive(removed: Removed) -> npt.NDArray[np.float64]:
        sizes: npt.NDArray[np.int64] = elements(removed) * element_bytes // images
        # Whole numbers below 2**53 are exact in float64, the only weights that bincount takes.
        change = np.bincount(first, sizes, moments) - np.bincount(after, sizes, moments)
        result: npt.NDArray[np.float64] = np.cumsum(change)
        return result

    return alive


def _shares_memory(node: Node) -> bool:
    """Return whether an operation returns its first argument, or a view of it, without a copy."""
    source, value = node.args[0] if node.args else None, node.meta.get("val")
    if not isinstance(source, Node):
        return False
    if gives_its_input(node):  # whatever storage tracing gave it
        return True
    first = value[0] if isinstance(value, list | tuple) and value else value
    before = source.meta.get("val")
    if not is_view(node) or not isinstance(first, Tensor) or not isinstance(before, Tensor):
        return False
    return first.untyped_storage() is before.untyped_storage()
