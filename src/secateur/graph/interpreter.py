"""Run a traced network node by node."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import Node, map_arg

from secateur.graph.network_graph import (
    Compute,
    NetworkGraph,
    NodeHook,
    Sizes,
    Tensors,
    operation_name,
)


class GraphInterpreter:
    """One batch on its way through the graph; only values that are still needed are kept.

    `sizes` are the arguments that differ where `state` belongs to a cut network
    (`DependencyGraph.sizes_after`). `answers` are what layers have given for the same batch and
    state before; those that are missing are added.
    """

    def __init__(
        self,
        graph: NetworkGraph,
        state: Tensors,
        images: Tensor,
        sizes: Sizes | None = None,
        answers: dict[Node, Tensor] | None = None,
    ) -> None:
        self._graph = graph
        self._state = state
        self._sizes = sizes or {}
        self._answers = answers
        self._next = 0
        self._values: dict[Node, Any] = {graph.image: images, **graph.constants}

    def values(self) -> list[tuple[int, Any]]:
        """What it holds, but for the network's constants, with the place in the graph of each."""
        return [
            (number, self._values[node])
            for number, node in enumerate(self._graph.nodes)
            if node in self._values and node not in self._graph.constants
        ]

    def hold(self, values: list[tuple[int, Any]]) -> None:
        """Takes over what `values` gave, in place of all that it holds itself."""
        nodes = self._graph.nodes
        held = {nodes[place]: value for place, value in values}
        self._values = {**self._graph.constants, **held}

    def has(self, node: Node) -> bool:
        """Whether a node has been computed and is still needed downstream."""
        return node in self._values

    def copy(self) -> GraphInterpreter:
        """A second walk from here on; what it computes does not show in this one."""
        twin = copy.copy(self)
        twin._values = dict(self._values)
        return twin

    def step(self, node: Node) -> Tensor:
        """Runs up to and including `node`; its value."""
        self.advance(node)
        seen: list[Tensor] = []
        following = self._graph.nodes[self._next + 1]
        self.advance(following, after={node: seen.append})
        return seen[0]

    def value(self, node: Node) -> Tensor:
        """The value of a node that has been computed and is still needed downstream."""
        result = self._values[node]
        assert isinstance(result, Tensor)
        return result

    def advance(
        self,
        until: Node | None = None,
        *,
        after: Mapping[Node, NodeHook] | None = None,
        overrides: Mapping[Node, Compute] | None = None,
    ) -> None:
        """Runs up to, not including, the node `until`; to the end without it.

        `after[node]` sees, and may replace, the value of a node; `instead[node]` computes it from
        the values that it reads.
        """
        after, overrides = after or {}, overrides or {}
        nodes = self._graph.nodes
        while self._next < len(nodes) and nodes[self._next] is not until:
            node = nodes[self._next]
            self._next += 1
            if node.op == "call_function":
                value = self._compute(node, overrides.get(node))
                if node in after:
                    replaced = after[node](value)
                    value = value if replaced is None else replaced
                self._values[node] = value
            for source in node.all_input_nodes:
                keep = source in self._graph.outputs
                if not keep and self._graph.last_use[source] is node:
                    self._values.pop(source, None)

    def _lookup(self, node: Node) -> Any:
        """Parameters are looked up when they are used: the state may change on the way."""
        name = self._graph.tensor_names.get(node)
        return self._values[node] if name is None else self._state[name]

    def _compute(self, node: Node, other: Compute | None) -> Any:
        if other is not None:
            return other(self._lookup)
        sizes = self._sizes.get(node, {})
        if self._answers is None or operation_name(node) not in ("conv2d", "linear"):
            return apply(node, self._lookup, sizes)
        if node not in self._answers:
            self._answers[node] = apply(node, self._lookup, sizes)
        return self._answers[node]


def apply(node: Node, lookup: Callable[[Node], Any], sizes: Mapping[int, Any]) -> Any:
    """An operation's value, from what it reads and arguments that differ from the graph's."""
    args, kwargs = with_sizes(node, sizes)
    assert callable(node.target)
    return node.target(*map_arg(tuple(args), lookup), **map_arg(kwargs, lookup))


def with_sizes(node: Node, sizes: Mapping[int, Any]) -> tuple[list[Any], dict[str, Any]]:
    """An operation's arguments with some of them replaced, by position."""
    args: list[Any] = list(node.args)
    for position, value in sizes.items():
        while len(args) <= position:  # an argument that was left at its default
            assert isinstance(node.target, torch._ops.OpOverload)
            args.append(node.target._schema.arguments[len(args)].default_value)
        args[position] = value
    return args, dict(node.kwargs)


def run(
    graph: NetworkGraph,
    state: Tensors,
    images: Tensor,
    *,
    after: Mapping[Node, NodeHook] | None = None,
) -> Tensor:
    """The network's output for a batch, with `state` as its parameters and buffers."""
    walk = GraphInterpreter(graph, state, images)
    walk.advance(after=after)
    return walk.value(graph.output)
