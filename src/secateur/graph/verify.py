"""Trial cuts: whether a network that has been cut is what its dependency graph says.

Channels are cut, the smaller network is traced, and its graph is compared with the one that was
predicted, operation by operation. So nothing that a network's code does with a number of channels
(a size, a scale, a branch) goes unseen.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.node import Node

from secateur.errors import TraceError
from secateur.graph.channel_ids import Count
from secateur.graph.cut import SizeConflict, attribute_values, cut
from secateur.graph.dependency import DependencyGraph, Removed
from secateur.graph.interpreter import with_sizes
from secateur.graph.network_graph import (
    Forward,
    NetworkGraph,
    argument,
    first_input,
    operation_name,
    position_of,
    shape_of,
)
from secateur.graph.trace import trace


def is_predicted(
    model: nn.Module,
    example: Tensor,
    forward: Forward | None,
    dependencies: DependencyGraph,
    *,
    thorough: bool,
) -> bool:
    """Whether trial cuts, traced again, give the operations and sizes that were predicted.

    `thorough`: see `trials`.
    """
    if not _is_consistent(dependencies):
        return False
    for removed in test_cuts(dependencies, thorough=thorough):
        try:
            smaller = cut(model, dependencies, removed)
        except SizeConflict:
            return False
        try:
            graph = trace(smaller, example, forward)
        except TraceError:
            return False
        if not _is_graph_predicted(dependencies, removed, graph):
            return False
    return True


def test_cuts(dependencies: DependencyGraph, *, thorough: bool) -> list[dict[str, tuple[int, ...]]]:
    """One cut of some channels of each group, always the same.

    Where it leaves a group as it is, and if `thorough`, a second one, of the others, and a third of
    one channel a group, which leaves no two halves the same: for operations whose sizes may come
    from anywhere.
    """
    first = _test_cut(dependencies, None, least=0 if thorough else 1)
    if not thorough and all(name in first or len(g) < 2 for name, g in dependencies.groups.items()):
        return [first] if first else []
    second = _test_cut(dependencies, first, least=0)
    single = {name: numbers[-1:] for name, numbers in second.items()}
    return [removed for removed in (first, second, single) if removed]


def _test_cut(
    dependencies: DependencyGraph, before: Removed | None, least: int
) -> dict[str, tuple[int, ...]]:
    """About a third of the channels of each group; with `before` all others, as far as they can go.

    No two numbers that may be taken for each other should come out the same: groups of one size
    lose different numbers of channels, at least `least` while they can, and the first half of a
    group loses more than the second.
    """
    generator = np.random.default_rng(0)
    amounts: dict[int, Iterator[int]] = {}
    removed: dict[str, tuple[int, ...]] = {}
    left = [len(cover) for cover in dependencies.covers]
    covers: dict[int, list[int]] = {}
    for number, cover in enumerate(dependencies.covers):
        for channel in cover.tolist():
            covers.setdefault(channel, []).append(number)
    for name, group in dependencies.groups.items():
        size, done = len(group), (before or {}).get(name, ())
        if size not in amounts:
            possible = range(min(least, size - 1), size)
            nearest = sorted(possible, key=lambda amount: abs(3 * amount - size))
            amounts[size] = itertools.cycle(nearest)
        wanted = next(amounts[size])
        if before is not None:
            wanted = min(size - len(done), size - 1)
        chosen: list[int] = []
        order = np.argsort(generator.random(size) + np.arange(size) / size).tolist()
        for place in sorted(order, key=set(done).__contains__):
            mine = covers.get(int(group.channels[place]), [])
            if len(chosen) < wanted and all(left[number] > 1 for number in mine):
                chosen.append(place)
                for number in mine:
                    left[number] -= 1
        if chosen:
            removed[name] = tuple(sorted(chosen))
    return removed


def _is_consistent(dependencies: DependencyGraph) -> bool:
    """Whether no attribute has to be two numbers, for cuts of any size."""
    generator = np.random.default_rng(0)
    for _ in range(32):
        removed = {
            name: tuple(np.flatnonzero(generator.random(len(group)) < generator.random()).tolist())
            for name, group in dependencies.groups.items()
        }
        try:
            attribute_values(dependencies, removed)
        except SizeConflict:
            return False
    return True


def _is_graph_predicted(
    dependencies: DependencyGraph, removed: Removed, graph: NetworkGraph
) -> bool:
    count, sizes = dependencies.count_after(removed), dependencies.sizes_after(removed)
    if len(dependencies.graph.nodes) != len(graph.nodes):
        return False
    twins = dict(zip(graph.nodes, dependencies.graph.nodes, strict=True))
    return all(
        node.op == found.op
        and node.target == found.target
        and dependencies.graph.tensor_names.get(node) == graph.tensor_names.get(found)
        and _is_same_constant(graph.constants.get(found), dependencies.graph.constants.get(node))
        and all(
            list(shape) == expected
            for shape, expected in zip(
                _shapes(found),
                _predicted_shapes(dependencies, node, count, graph.images),
                strict=True,
            )
        )
        and _are_arguments_predicted(node, found, sizes.get(node, {}), twins)
        for found, node in twins.items()
    )


def _is_same_constant(found: Tensor | None, expected: Tensor | None) -> bool:
    return found is expected is None or (
        found is not None and expected is not None and torch.equal(found, expected)
    )


def _shapes(node: Node) -> list[Sequence[int]]:
    """Shapes of an operation's values."""
    value = node.meta.get("val") if node.op == "call_function" else None
    values = value if isinstance(value, list | tuple) else [value]
    return [each.shape for each in values if isinstance(each, Tensor)]


def _predicted_shapes(
    dependencies: DependencyGraph, node: Node, count: Count, images: int
) -> Iterator[list[int]]:
    """Shapes of an operation's values after a cut, for a batch of so many images."""
    before = dependencies.graph.images
    several = dependencies.several.get(node, [dependencies.axes.get(node, ())])
    several = [axes for axes in several if axes] if len(several) > 1 else several
    for shape, axes in zip(_shapes(node), several, strict=False):
        known = axes or (None,) * len(shape)
        yield [
            size // before * images if ids is None and size % before == 0 else count(ids, size)
            for ids, size in zip(known, shape, strict=True)
        ]


def _are_arguments_predicted(
    node: Node, found: Node, sizes: Mapping[int, Any], twins: Mapping[Node, Node]
) -> bool:
    args, kwargs = with_sizes(node, sizes)
    if operation_name(node) == "slice" and _range(found, found.args) is not None:
        return (
            _range(found, found.args) == _range(found, args)
            and twins[first_input(found)] is args[0]
        )
    return _is_same(_filled(found, found.args), _filled(node, args), twins) and _is_same(
        list(found.kwargs.values()), list(kwargs.values()), twins
    )


def _filled(node: Node, args: Sequence[Any]) -> list[Any]:
    """All arguments, those that were left at their defaults included."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return list(args)
    rest = node.target._schema.arguments[len(args) :]
    return [*args, *(a.default_value for a in rest if not a.kwarg_only)]


def _range(found: Node, args: Sequence[Any]) -> tuple[int, int, int] | None:
    """First, behind the last and step of a slice; None where they depend on the batch."""
    size = shape_of(first_input(found))[argument(found, "dim", 0)]
    names = ("start", "end", "step")
    positions = [position_of(found, name) for name in names]
    bounds = [args[position] if position < len(args) else None for position in positions]
    if any(isinstance(bound, Node) for bound in bounds):
        return None
    return slice(*bounds).indices(size)


def _is_same(found: object, expected: object, twins: Mapping[Node, Node]) -> bool:
    """Whether two arguments hold the same; a size that is left to be worked out is not compared."""
    if isinstance(found, Node):
        return twins[found] is expected
    if isinstance(found, list | tuple) and isinstance(expected, list | tuple):
        pairs = zip(found, expected, strict=False)
        return len(found) == len(expected) and all(_is_same(a, b, twins) for a, b in pairs)
    return found == expected or (found == -1 and isinstance(expected, int))
