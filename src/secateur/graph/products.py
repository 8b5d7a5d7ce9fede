"""Products with a matrix that does not depend on the images: each becomes a linear layer.

So `tokens @ weight` and `einsum("bchw,wv->bchv", maps, weight)` are followed as a layer is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.fx.graph import Graph
from torch.fx.node import Node

from secateur.graph.graph_edits import call_like
from secateur.graph.network_graph import argument, operation_name, shape_of

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class _Product:
    """A product of two tensors whose dimensions have names: those in both are summed over."""

    tensors: tuple[Node, Node]
    names: tuple[list[str], list[str]]
    output: list[str]


def products_as_layers(graph: Graph, image: Node) -> None:
    """Replace each product of feature maps with a matrix that is not computed from the images."""
    products = [node for node in graph.nodes if operation_name(node) in _DIMENSIONS]
    if not products:
        return
    computed = {image}
    for node in graph.nodes:
        if not computed.isdisjoint(node.all_input_nodes):
            computed.add(node)
    for node in products:
        product = _DIMENSIONS[operation_name(node)](node)
        is_computed = tuple(t in computed for t in product.tensors) if product else ()
        if product is not None and sum(is_computed) == 1:
            _replace(graph, node, product, is_computed.index(True))


def _replace(graph: Graph, node: Node, product: _Product, first: int) -> None:
    """Replace a product if it is one with a matrix, of which one dimension is summed over."""
    maps, matrix = product.tensors[first], product.tensors[1 - first]
    names, sides = product.names[first], product.names[1 - first]
    summed = [name for name in names if name not in product.output]
    new = [name for name in sides if name not in summed]
    kept = [name for name in names if name not in summed]
    if (
        [len(summed), len(new), len(sides)] != [1, 1, 2]
        or summed[0] not in sides
        or sorted(kept + new) != sorted(product.output)
        or len({*names}) < len(names)
    ):
        return
    with graph.inserting_before(node):
        order = [names.index(name) for name in (*kept, *summed)]
        if order != sorted(order):
            maps = call_like(graph, node, _ATEN.permute.default, maps, order)
        if sides[1] != summed[0]:
            matrix = call_like(graph, node, _ATEN.t.default, matrix)
        value = call_like(graph, node, _ATEN.linear.default, maps, matrix)
        order = [(*kept, *new).index(name) for name in product.output]
        if order != sorted(order):
            value = call_like(graph, node, _ATEN.permute.default, value, order)
    node.replace_all_uses_with(value)
    graph.erase_node(node)


def _matmul(node: Node) -> _Product | None:
    left, right = node.args[:2]
    assert isinstance(left, Node)
    assert isinstance(right, Node)
    ranks = len(shape_of(left)), len(shape_of(right))
    if min(ranks) < 2 or (ranks[0] > 2 and ranks[1] > 2):
        return None
    batch = [str(number) for number in range(max(ranks) - 2)]
    names = [*batch, "row", "sum"][-ranks[0] :], [*batch, "sum", "column"][-ranks[1] :]
    return _Product((left, right), names, [*batch, "row", "column"])


def _inner(node: Node) -> _Product | None:
    dims = len(shape_of(node.args[0])) - 1  # type: ignore[arg-type]
    return _contracted(node, [dims], [len(shape_of(node.args[1])) - 1])  # type: ignore[arg-type]


def _tensordot(node: Node) -> _Product | None:
    return _contracted(node, argument(node, "dims_self"), argument(node, "dims_other"))


def _contracted(node: Node, dims: Sequence[int], others: Sequence[int]) -> _Product | None:
    """Return a product that sums over pairs of dimensions."""
    one, other = node.args[:2]
    assert isinstance(one, Node)
    assert isinstance(other, Node)
    names = (
        [f"one {dim}" for dim in range(len(shape_of(one)))],
        [f"other {dim}" for dim in range(len(shape_of(other)))],
    )
    if not all(names):
        return None
    for number, (dim, other_dim) in enumerate(zip(dims, others, strict=True)):
        names[0][dim] = names[1][other_dim] = f"sum {number}"
    output = [name for name in itertools.chain(*names) if not name.startswith("sum")]
    return _Product((one, other), names, output)


def _einsum(node: Node) -> _Product | None:
    equation, tensors = argument(node, "equation"), argument(node, "tensors")
    inputs, arrow, output = str(equation).replace(" ", "").partition("->")
    names = [list(part) for part in inputs.split(",")]
    if len(tensors) != 2 or not arrow or "." in equation:
        return None
    return _Product((tensors[0], tensors[1]), (names[0], names[1]), list(output))


_DIMENSIONS: dict[str, Callable[[Node], _Product | None]] = {
    "matmul": _matmul,
    "mm": _matmul,
    "inner": _inner,
    "tensordot": _tensordot,
    "einsum": _einsum,
}
