"""Verifies a dependency graph: cuts the network for a test and compares it with the prediction.

Channels are cut, the smaller network is traced, and its graph is compared with the predicted one,
operation by operation. So whatever a network's code does with a number of channels (a size, a
scale, a branch) is noticed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.node import Node

from secateur.graph.call_sites import call_site
from secateur.graph.channel_ids import Count
from secateur.graph.cut import SizeConflict, attribute_values, cut
from secateur.graph.dependency import DependencyGraph, Removed
from secateur.graph.interpreter import with_sizes
from secateur.graph.network_graph import (
    NetworkGraph,
    argument,
    first_input,
    operation_name,
    position_of,
    shape_of,
)
from secateur.graph.trace import trace
from secateur.runtime.errors import TraceError
from secateur.runtime.torch_internals import OpOverload, schema_of


def find_difference(
    model: nn.Module,
    example: Tensor,
    dependencies: DependencyGraph,
    *,
    thorough: bool,
) -> str | None:
    """Return where networks after test cuts don't have the predicted operations and sizes.

    None if they have, empty if the place is not known. `thorough`: see `choose_test_cuts`.
    """
    if not _is_consistent(dependencies):
        return ""
    for removed in choose_test_cuts(dependencies, thorough=thorough):
        try:
            smaller = cut(model, dependencies, removed)
        except SizeConflict:
            return ""
        try:
            graph = trace(smaller, example, dependencies.graph.whole, records_modules=False)
        except TraceError:
            return ""
        node = _first_difference(dependencies, removed, graph)
        if node is not None:
            return call_site(node)
    return None


def choose_test_cuts(
    dependencies: DependencyGraph, *, thorough: bool
) -> list[dict[str, tuple[int, ...]]]:
    """Return one cut of some channels of each group, always the same.

    If it leaves a group whole, or if `thorough`, there are two more: one of the other channels, and
    one of a single channel per group, after which no two halves have the same size. They are for
    operations whose sizes may come from anywhere.
    """
    first = _choose_test_cut(dependencies, None, least=0 if thorough else 1)
    if not thorough and all(name in first or len(g) < 2 for name, g in dependencies.groups.items()):
        return [first] if first else []
    second = _choose_test_cut(dependencies, first, least=0)
    single = {name: numbers[-1:] for name, numbers in second.items()}
    return [removed for removed in (first, second, single) if removed]


def _choose_test_cut(
    dependencies: DependencyGraph, before: Removed | None, least: int
) -> dict[str, tuple[int, ...]]:
    """Return about a third of each group's channels; with the cut `before`, all others it left.

    No two numbers that could be confused should be equal after the cut: groups of the same size
    lose different numbers of channels, at least `least` while they can, and the first half of a
    group loses more than the second.
    """
    generator = np.random.default_rng(0)
    amounts: dict[int, Iterator[int]] = {}
    removed: dict[str, tuple[int, ...]] = {}
    remaining = [len(cover) for cover in dependencies.covers]
    covers_of: dict[int, list[int]] = {}
    for number, cover in enumerate(dependencies.covers):
        for channel in cover.tolist():
            covers_of.setdefault(channel, []).append(number)
    for name, group in dependencies.groups.items():
        size, removed_before = len(group), (before or {}).get(name, ())
        if size not in amounts:
            possible = range(min(least, size - 1), size)
            nearest = sorted(possible, key=lambda amount: abs(3 * amount - size))
            amounts[size] = itertools.cycle(nearest)
        amount = next(amounts[size])
        if before is not None:
            amount = min(size - len(removed_before), size - 1)
        chosen: list[int] = []
        order = np.argsort(generator.random(size) + np.arange(size) / size).tolist()
        for index in sorted(order, key=set(removed_before).__contains__):
            covers = covers_of.get(int(group.channels[index]), [])
            if len(chosen) < amount and all(remaining[number] > 1 for number in covers):
                chosen.append(index)
                for number in covers:
                    remaining[number] -= 1
        if chosen:
            removed[name] = tuple(sorted(chosen))
    return removed


def _is_consistent(dependencies: DependencyGraph) -> bool:
    """Return whether no attribute would need two values, for random cuts of any size."""
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


def _first_difference(
    dependencies: DependencyGraph, removed: Removed, graph: NetworkGraph
) -> Node | None:
    """Return the first operation of the original that the cut network's graph does not have."""
    before = dependencies.graph
    count, sizes = dependencies.count_after(removed), dependencies.sizes_after(removed)
    originals = dict(zip(graph.nodes, before.nodes, strict=False))

    def is_predicted(node: Node, original: Node) -> bool:
        return (
            node.op == original.op
            and node.target == original.target
            and graph.tensor_names.get(node) == before.tensor_names.get(original)
            and _is_same_constant(graph.constants.get(node), before.constants.get(original))
            and all(
                list(shape) == predicted
                for shape, predicted in zip(
                    _shapes(node),
                    _predicted_shapes(dependencies, original, count, graph.images),
                    strict=True,
                )
            )
            and _are_arguments_predicted(node, original, sizes.get(original, {}), originals)
        )

    for node, original in originals.items():
        if not is_predicted(node, original):
            return original
    return None if len(before.nodes) == len(graph.nodes) else before.nodes[-1]


def _is_same_constant(constant: Tensor | None, expected: Tensor | None) -> bool:
    return constant is expected is None or (
        constant is not None and expected is not None and torch.equal(constant, expected)
    )


def _shapes(node: Node) -> list[Sequence[int]]:
    """Return the shapes of an operation's values."""
    return [output.shape for output in _values(node) if isinstance(output, Tensor)]


def _values(node: Node) -> Sequence[object]:
    """Return an operation's values, in the traced batch."""
    value = node.meta.get("val") if node.op == "call_function" else None
    return value if isinstance(value, list | tuple) else [value]


def _predicted_shapes(
    dependencies: DependencyGraph, original: Node, count: Count, images: int
) -> Iterator[list[int]]:
    """Yield the shapes of an operation's values after a cut, for a batch of `images`."""
    before = dependencies.graph.images
    outputs = dependencies.multi_output_axes.get(original, [dependencies.axes.get(original, ())])
    for value, axes in zip(_values(original), outputs, strict=False):
        if not isinstance(value, Tensor):
            continue
        shape = value.shape
        known_axes = axes or (None,) * len(shape)
        yield [
            size // before * images if ids is None and size % before == 0 else count(ids, size)
            for ids, size in zip(known_axes, shape, strict=True)
        ]


def _are_arguments_predicted(
    node: Node, original: Node, sizes: Mapping[int, Any], originals: Mapping[Node, Node]
) -> bool:
    args, kwargs = with_sizes(original, sizes)
    has_range = operation_name(original) in ("slice", "slice_scatter")
    if has_range and _range(node, node.args) is not None:
        inputs = [argument for argument in args if isinstance(argument, Node)]
        return (
            _range(node, node.args) == _range(node, args)
            and [originals[source] for source in node.args if isinstance(source, Node)] == inputs
        )
    return _is_same(_filled(node, node.args), _filled(original, args), originals) and _is_same(
        list(node.kwargs.values()), list(kwargs.values()), originals
    )


def _filled(node: Node, args: Sequence[Any]) -> list[Any]:
    """Return all arguments, including those that were left at their defaults."""
    if not isinstance(node.target, OpOverload):
        return list(args)
    rest = schema_of(node.target).arguments[len(args) :]
    return [*args, *(a.default_value for a in rest if not a.kwarg_only)]


def _range(node: Node, args: Sequence[Any]) -> tuple[int, int, int] | None:
    """Return start, end and step of a slice; None if they depend on the batch size."""
    size = shape_of(first_input(node))[argument(node, "dim", 0)]
    names = ("start", "end", "step")
    positions = [position_of(node, name) for name in names]
    bounds = [args[position] if position < len(args) else None for position in positions]
    if any(isinstance(bound, Node) for bound in bounds):
        return None
    return slice(*bounds).indices(size)


def _is_same(value: object, predicted: object, originals: Mapping[Node, Node]) -> bool:
    """Return whether two arguments are the same; a size of -1 (inferred) fits any number."""
    if isinstance(value, Node):
        return originals[value] is predicted
    if isinstance(value, list | tuple) and isinstance(predicted, list | tuple):
        pairs = zip(value, predicted, strict=False)
        return len(value) == len(predicted) and all(_is_same(a, b, originals) for a, b in pairs)
    return value == predicted or (value == -1 and isinstance(predicted, int))
