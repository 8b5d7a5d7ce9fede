"""The network as a graph of ATen operations that runs with any set of parameters.

`trace` reads the graph from `torch.export`; `Walk` runs it, node by node, with parameters that are
passed in by name. So one graph serves the original network, the same network with smaller
kernels, and the network with some of its channels silenced.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.graph import Graph
from torch.fx.node import Node, map_arg

from secateur.errors import TraceError

Tap = Callable[[Tensor], Tensor | None]
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class NetworkGraph:
    """ATen operations in the order of execution, with parameters and buffers by dotted name.

    No operation changes a value that another one wrote.
    """

    nodes: tuple[Node, ...]
    tensor_names: dict[Node, str]
    """Placeholder node -> dotted name of the parameter or buffer that it stands for."""
    constants: dict[Node, Tensor]
    image: Node
    """The placeholder of the network's input."""
    output: Node
    """The node whose value the network returns."""
    last_use: dict[Node, Node]
    """Value -> the last node that reads it."""


def trace(model: nn.Module, example: Tensor) -> NetworkGraph:
    """The graph of `model` in evaluation mode; the batch dimension stays open.

    `example` is a batch `[image, rgb, height, width]` of at least two images. Raises `TraceError`
    where `torch.export` can't follow the network, or where it has more than one input or output.
    """
    try:
        with evaluating(model):
            program = torch.export.export(
                model, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False
            )
    except Exception as error:  # torch.export raises many unrelated types
        cause = str(error).strip().splitlines() or [type(error).__name__]
        raise TraceError(
            f"the network can't be traced with an open batch dimension: {cause[0]}"
        ) from error
    signature = program.graph_signature
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    tensor_names: dict[Node, str] = {}
    constants: dict[Node, Tensor] = {}
    images: list[Node] = []
    _replace_in_place_operations(program.graph_module.graph)
    nodes = tuple(program.graph_module.graph.nodes)
    for node in nodes:
        if node.op == "placeholder":
            if node.name in named:
                tensor_names[node] = named[node.name]
            elif node.name in signature.inputs_to_lifted_tensor_constants:
                name = signature.inputs_to_lifted_tensor_constants[node.name]
                constants[node] = program.constants[name]
            else:
                images.append(node)
        elif node.op == "get_attr":
            constants[node] = getattr(program.graph_module, str(node.target))
    outputs = nodes[-1].args[0]
    if len(images) != 1 or not isinstance(outputs, tuple) or len(outputs) != 1:
        raise TraceError("the network must take one batch of images and return one tensor")
    last_use: dict[Node, Node] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            last_use[source] = node
    return NetworkGraph(nodes, tensor_names, constants, images[0], outputs[0], last_use)


def _replace_in_place_operations(graph: Graph) -> None:
    """Turns `x.relu_()` into `y = x.relu()`, with `y` in place of `x` in all that follows.

    Raises `TraceError` where the change would have to show through another view of `x`, or where
    an operation has no twin that leaves its input alone.
    """
    position = {node: number for number, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
            continue
        name = target._schema.name.split("::")[1]
        packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
        twin = getattr(packet, target._overloadname, None)
        changed = node.args[0]
        if not name.endswith("_") or twin is None or not isinstance(changed, Node):
            raise TraceError(f"the operation {name!r} writes in place and has no other form")
        others = _sharing_memory(changed) - {changed}
        if any(position[user] > position[node] for value in others for user in value.users):
            raise TraceError(f"the operation {name!r} writes into a view of a value still in use")
        node.target = twin
        for user in list(changed.users):
            if position[user] > position[node]:
                user.replace_input_with(changed, node)


def _sharing_memory(node: Node) -> set[Node]:
    """The values that share memory with a node: what it is a view of, and all views of that."""
    while _is_view(node) and isinstance(node.args[0], Node):
        node = node.args[0]
    sharing, coming = {node}, [node]
    while coming:
        views = [user for user in coming.pop().users if _is_view(user)]
        coming += views
        sharing.update(views)
    return sharing


def _is_view(node: Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
        return False
    returns = node.target._schema.returns
    return bool(returns) and returns[0].alias_info is not None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every module has the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by each of its dotted names, shared ones included; detached."""
    named = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in {**named, **buffers}.items()}


def operation_name(node: Node) -> str:
    """ATen name without overload: `add` for `aten.add.Tensor`."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return getattr(node.target, "__name__", str(node.target))
    return node.target._schema.name.split("::")[1]


class Walk:
    """One batch on its way through the graph; only values that are still needed are kept."""

    def __init__(self, graph: NetworkGraph, state: State, images: Tensor) -> None:
        self._graph = graph
        self._state = state
        self._next = 0
        self._values: dict[Node, Any] = {graph.image: images, **graph.constants}

    def fork(self) -> Walk:
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
        before: Mapping[Node, Tap] | None = None,
        after: Mapping[Node, Tap] | None = None,
    ) -> None:
        """Runs up to, not including, the node `until`; to the end without it.

        `before[node]` sees, and may replace, the first input of a node; `after[node]` its value.
        """
        before, after = before or {}, after or {}
        nodes = self._graph.nodes
        while self._next < len(nodes) and nodes[self._next] is not until:
            node = nodes[self._next]
            self._next += 1
            if node.op == "call_function":
                value = self._compute(node, before.get(node))
                if node in after:
                    replaced = after[node](value)
                    value = value if replaced is None else replaced
                self._values[node] = value
            for source in node.all_input_nodes:
                keep = source is self._graph.output
                if not keep and self._graph.last_use[source] is node:
                    self._values.pop(source, None)

    def _lookup(self, node: Node) -> Any:
        """Parameters are looked up when they are used: the state may change on the way."""
        name = self._graph.tensor_names.get(node)
        return self._values[node] if name is None else self._state[name]

    def _compute(self, node: Node, edit: Tap | None) -> Any:
        args: list[Any] = list(map_arg(node.args, self._lookup))
        kwargs = dict(map_arg(node.kwargs, self._lookup))
        if edit is not None:
            replaced = edit(args[0])
            args[0] = args[0] if replaced is None else replaced
        if len(args) > 6 and operation_name(node).startswith("conv"):
            # A depthwise convolution that lost channels has fewer groups than the trace says.
            args[6] = args[0].shape[1] // args[1].shape[1]
        assert callable(node.target)
        return node.target(*args, **kwargs)


def run(
    graph: NetworkGraph,
    state: State,
    images: Tensor,
    *,
    before: Mapping[Node, Tap] | None = None,
    after: Mapping[Node, Tap] | None = None,
) -> Tensor:
    """The network's output for a batch, with `state` as its parameters and buffers."""
    walk = Walk(graph, state, images)
    walk.advance(before=before, after=after)
    return walk.value(graph.output)
