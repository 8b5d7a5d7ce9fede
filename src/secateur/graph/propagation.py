"""Channel ids on their way through the graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx.node import Node
from torch.utils.flop_counter import FlopCounterMode

from secateur.errors import UsageError
from secateur.graph.channel_ids import Axes, Consumer, Ids, Layer, Resize
from secateur.graph.network_graph import NetworkGraph, operation_name

Rule = Callable[["ChannelPropagation", Node], Axes | list[Axes]]


class ChannelPropagation:
    """Channel ids on their way through the graph, and what was learnt about them."""

    def __init__(self, graph: NetworkGraph, rules: Mapping[str, Rule]) -> None:
        self.graph = graph
        self.axes: dict[Node, Axes] = {}
        self.several: dict[Node, list[Axes]] = {}
        """Axes of each value of an operation that has several."""
        self.layers: list[Layer] = []
        self.readers: list[Consumer] = []
        self.shortcuts: list[tuple[Ids, Ids]] = []
        """Channels that a sum ties to those that they were computed from."""
        self.mixing: set[Node] = set()
        """Operations over all channels, such as layer norm: with fewer they give something else."""
        self.resizes: dict[Node, Resize] = {}
        """Operations whose arguments hold numbers of channels."""
        self.written: list[Ids] = []
        """Channels along one dimension of some value: one of them must stay."""
        self.product_macs: int = 0
        """Multiply-accumulates an image in products of computed values, which are not cut."""
        self._rules = rules
        self._count = 0
        self._ties: list[tuple[Ids, Ids]] = []
        self._frozen: list[tuple[Ids, str]] = []
        self._order = {node: position for position, node in enumerate(graph.nodes)}
        self._ancestors: dict[Node, int] = {}
        """Each node with all that it is computed from, a bit for each."""
        self._kernels = _kernel_parameters(graph)

    def visit_all(self) -> None:
        """Works out the axes of every node's value, in the order of execution."""
        for node, position in self._order.items():
            above = 1 << position
            for source in node.all_input_nodes:
                above |= self._ancestors[source]
            self._ancestors[node] = above
            self._visit(node)

    def _visit(self, node: Node) -> None:
        value = node.meta.get("val")
        if node in self.graph.tensor_names:
            assert isinstance(value, Tensor)
            tracked = 2 if node in self._kernels else value.dim()
            self.axes[node] = tuple(
                self.fresh(int(size)) if dim < tracked else None
                for dim, size in enumerate(value.shape)
            )
        elif node.op == "call_function" and isinstance(value, Tensor | list | tuple):
            rule = self._rules.get(operation_name(node))
            found = rule(self, node) if rule else self._without_rule(node)
            self._check_rule(node, found)
            if isinstance(found, list):
                self.several[node] = found
                self.written.extend(ids for axes in found for ids in axes if ids is not None)
            else:
                self.axes[node] = found
        elif isinstance(value, Tensor):
            self.axes[node] = (None,) * value.dim()

    def _check_rule(self, node: Node, found: Axes | list[Axes]) -> None:
        """Raises `UsageError` where a rule does not give ids for every dimension of a value."""
        value = node.meta["val"]
        pairs = zip(found, value, strict=False) if isinstance(found, list) else [(found, value)]
        for axes, each in pairs:
            shape = tuple(each.shape) if isinstance(each, Tensor) else ()
            if len(axes) != len(shape) or any(
                ids is not None and len(ids) != size for ids, size in zip(axes, shape, strict=True)
            ):
                sizes = [None if ids is None else len(ids) for ids in axes]
                raise UsageError(
                    f"the rule for {operation_name(node)!r} gives {sizes} channels along the "
                    f"dimensions of a value of the size {list(shape)}"
                )

    def fresh(self, size: int) -> Ids:
        """New channel ids."""
        self._count += size
        return np.arange(self._count - size, self._count, dtype=np.int64)

    def fixed(self, size: int, reason: str) -> Ids:
        """New channel ids that can't be cut."""
        ids = self.fresh(size)
        self.freeze((ids,), reason)
        return ids

    def tie(self, one: Ids | None, other: Ids | None, reason: str) -> None:
        """States that two dimensions hold the same channels, index by index.

        Where one of them has a size that never changes the other is frozen for the reason.
        """
        if one is None or other is None:
            self.freeze((one, other), reason)
        elif one is not other:
            self._ties.append((one, other))

    def tie_rows(self, ids: Ids) -> Ids:
        """States that each row of `[channel, copy]` is one channel; `[channel]`."""
        first = np.ascontiguousarray(ids[:, 0])
        if ids.shape[1] > 1:
            self._ties.append((np.repeat(first, ids.shape[1] - 1), ids[:, 1:].reshape(-1)))
        return first

    def freeze(self, axes: Iterable[Ids | None], reason: str) -> None:
        """States that no channel of these axes can be cut."""
        self._frozen.extend((ids, reason) for ids in axes if ids is not None)

    def refuse(self, node: Node, reason: str) -> Any:
        """Freezes all that the node reads; so what it writes has a size that never changes."""
        for source in node.all_input_nodes:
            for axes in self.several.get(source, [self.axes.get(source, ())]):
                self.freeze(axes, reason)
        return fixed_axes(node)

    def _without_rule(self, node: Node) -> Any:
        return self.refuse(node, f"no rule for the operation {operation_name(node)!r}")

    def count_product(self, node: Node) -> None:
        """Adds the multiply-accumulates of an operation that is no layer."""
        tensors: list[Node] = []

        def value_of(source: Node) -> Any:
            if isinstance(source.meta["val"], Tensor):
                tensors.append(source)
            return source.meta["val"]

        arguments = torch.fx.node.map_arg((node.args, node.kwargs), value_of)
        if len(tensors) < 2:
            return
        mode = tensors[0].meta["val"].fake_mode
        assert callable(node.target)
        with mode, torch.no_grad(), FlopCounterMode(display=False) as counter:
            node.target(*arguments[0], **arguments[1])
        self.product_macs += int(counter.get_total_flops()) // 2 // self.graph.images

    def depends_on(self, node: Node, source: Node) -> bool:
        """Whether a value is computed from another one, or is that one."""
        return bool(self._ancestors[node] >> self._order[source] & 1)

    @property
    def size(self) -> int:
        """Number of channel ids given out."""
        return self._count

    def freeze_residual_channels(self, reason: str) -> None:
        """Freezes channels that only a shortcut around layers ties."""
        root = self.roots(with_shortcuts=False)
        for one, other in self.shortcuts:
            differ = root[one] != root[other]
            self.freeze((one[differ], other[differ]), reason)

    def roots(self, *, with_shortcuts: bool = True) -> Ids:
        """`[id]`: the smallest id that each id is tied to, directly or through others."""
        parent = np.arange(self._count, dtype=np.int64)
        ties = [*self._ties, *self.shortcuts] if with_shortcuts else self._ties
        if not ties:
            return parent
        one = np.concatenate([a for a, _ in ties])
        other = np.concatenate([b for _, b in ties])
        while True:
            low, high = np.sort(np.stack([parent[one], parent[other]]), axis=0)
            if (low == high).all():
                return parent
            np.minimum.at(parent, high, low)
            while not (parent == parent[parent]).all():
                parent = parent[parent]

    def reasons(self, roots: Ids, held: Iterable[tuple[Ids, str]] = ()) -> dict[int, str]:
        """`{root: the first reason why the channel must stay}`; `held` are further ones."""
        found: dict[int, str] = {}
        for ids, reason in (*self._frozen, *held):
            for channel in np.unique(roots[ids]).tolist():
                found.setdefault(channel, reason)
        return found


def fixed_axes(node: Node) -> Any:
    """Axes of an operation's value, or of each of several, whose sizes never change."""
    value: Any = node.meta["val"]
    if isinstance(value, Tensor):
        return (None,) * value.dim()
    return [(None,) * v.dim() if isinstance(v, Tensor) else () for v in value]


def _kernel_parameters(graph: NetworkGraph) -> set[Node]:
    """Parameters that are, or are made into, the kernel of a convolution."""
    coming = [
        node.args[1]
        for node in graph.nodes
        if operation_name(node).startswith("conv") and len(node.args) > 1
    ]
    found: set[Node] = set()
    while coming:
        node = coming.pop()
        if isinstance(node, Node) and node not in found:
            found.add(node)
            coming.extend(node.all_input_nodes)
    return {n for n in found if n in graph.tensor_names and n.meta["val"].dim() > 2}


def positions(spread: ChannelPropagation, *sizes: Sequence[int]) -> int:
    """How many positions an image has in dimensions of these sizes, the batch among them."""
    return math.prod(size for part in sizes for size in part) // spread.graph.images
