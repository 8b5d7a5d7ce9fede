"""What the values of a network take up while it answers, in the order of execution."""

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
from secateur.pruning.cost.tensor_sizes import Dimension, TensorSizes, dimensions_of

NEAR_MAXIMUM = 16


@dataclass(frozen=True, eq=False)
class Storage:
    """Memory that a value, and what is a view of it, lies in."""

    node: Node
    """The operation that writes it, or the placeholder of the images."""
    dimensions: tuple[Dimension, ...]
    images: int
    """How many images the dimensions are of; 1 where they don't depend on the batch."""
    element_bytes: int
    first: int
    """Position of `node` in the order of execution."""
    last: int
    """Position of the last operation that reads it; of the graph's end, where it is an answer."""


def storages(dependencies: DependencyGraph) -> list[Storage]:
    """All that operations write, and the images; not parameters, buffers and constants.

    An operation in place writes a storage of its own here, as it does in the graph.
    """
    graph = dependencies.graph
    position = {node: number for number, node in enumerate(graph.nodes)}
    found: list[Storage] = []
    at: dict[Node, list[int | None]] = {}
    """Place in `found` of each value of a node; None for parameters and views of them."""

    def add(node: Node, value: Any, axes: Axes) -> int | None:
        if not isinstance(value, Tensor):
            return None
        shape = tuple(int(size) for size in value.shape)
        images = graph.images if any(s and s % graph.images == 0 for s in shape) else 1
        dimensions = dimensions_of(dependencies, axes, shape)
        place = position[node]
        found.append(Storage(node, dimensions, images, value.dtype.itemsize, place, place))
        return len(found) - 1

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
                found[place] = replace(found[place], last=max(found[place].last, last))
    return found


def peak_bytes(dependencies: DependencyGraph) -> Callable[[Removed], float]:
    """A function of what goes: most bytes of values alive at once, for one image."""
    alive = _alive_bytes(dependencies)
    return lambda removed: float(alive(removed).max())


def total_bytes(dependencies: DependencyGraph) -> int:
    """Bytes of all values together, for one image: what is held where gradients are to flow."""
    each = storages(dependencies)
    elements = TensorSizes(dependencies, [storage.dimensions for storage in each])({}).tolist()
    return sum(
        count * storage.element_bytes // storage.images
        for count, storage in zip(elements, each, strict=True)
    )


def crowding(dependencies: DependencyGraph) -> Callable[[Removed], float]:
    """A function of what goes that comes down with every moment at which much is alive.

    The `NEAR_MAXIMUM`-norm of the bytes alive over the moments: where the peak is reached in
    several layers it tells that one of them has become smaller, which the peak itself does not.
    """
    alive = _alive_bytes(dependencies)
    return lambda removed: float(np.linalg.norm(alive(removed), NEAR_MAXIMUM))


def _alive_bytes(dependencies: DependencyGraph) -> Callable[[Removed], npt.NDArray[np.float64]]:
    """A function of what goes: bytes of values alive at each moment, for one image.

    A value is alive from the operation that writes it to the last one that reads it; the memory
    that an operation takes for itself meanwhile is not counted.
    """
    each = storages(dependencies)
    volumes = TensorSizes(dependencies, [storage.dimensions for storage in each])
    element_bytes = np.array([storage.element_bytes for storage in each])
    images = np.array([storage.images for storage in each])
    first = np.array([storage.first for storage in each])
    after = np.array([storage.last + 1 for storage in each])
    moments = len(dependencies.graph.nodes) + 2

    def alive(removed: Removed) -> npt.NDArray[np.float64]:
        sizes: npt.NDArray[np.int64] = volumes(removed) * element_bytes // images
        # Whole numbers below 2**53 are exact in float64, the only weights that bincount takes.
        change = np.bincount(first, sizes, moments) - np.bincount(after, sizes, moments)
        result: npt.NDArray[np.float64] = np.cumsum(change)
        return result

    return alive


def _shares_memory(node: Node) -> bool:
    """Whether an operation gives its first argument, or a view of it, and copies nothing."""
    source, value = node.args[0] if node.args else None, node.meta.get("val")
    if not isinstance(source, Node):
        return False
    if gives_its_input(node):  # whatever storage the tracing gave it
        return True
    first = value[0] if isinstance(value, list | tuple) and value else value
    before = source.meta.get("val")
    if not is_view(node) or not isinstance(first, Tensor) or not isinstance(before, Tensor):
        return False
    return bool(first.untyped_storage()._cdata == before.untyped_storage()._cdata)
