"""A traced network as a value: its operations in order, and functions that read one operation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import FunctionSchema, Tensor
from torch.fx.node import Node

from secateur.runtime.errors import TraceError
from secateur.runtime.torch_internals import OpOverload, schema_of

NodeHook = Callable[[Tensor], Tensor | None]
"""Sees the value of an operation, and replaces it unless it returns None."""
Tensors = Mapping[str, Tensor]
"""Parameters and buffers by dotted name."""
Forward = Callable[..., Any]
"""What to trace of a network: `forward(model, images)` returns a tensor or several. Where the
network takes several inputs it is `forward(model, *inputs)`, with names if they have any."""
Sizes = Mapping[Node, Mapping[int, Any]]
"""Arguments of operations, by position, that differ from those in the graph."""
Compute = Callable[[Callable[[Node], Any]], Any]
"""Computes an operation's value, from a function that looks up the values of its inputs."""


@dataclass(frozen=True)
class NetworkGraph:
    """ATen operations in the order of execution, with parameters and buffers by dotted name.

    No operation writes in place.
    """

    nodes: tuple[Node, ...]
    tensor_names: dict[Node, str]
    """Placeholder node -> dotted name of the parameter or buffer that it stands for."""
    constants: dict[Node, Tensor]
    image: Node
    """Placeholder of the network's input."""
    outputs: tuple[Node, ...]
    """Nodes whose values the network returns, in the order of its flattened output."""
    last_use: dict[Node, Node]
    """Node -> the last node that reads its value."""
    images: int
    """Images in the traced batch; sizes in the graph that depend on the batch are multiples."""
    whole: frozenset[str]
    """Operations that stay whole; others that torch composes of several are replaced by these."""

    @property
    def output(self) -> Node:
        """The node whose value the network returns; raises `TraceError` if there are several."""
        if len(self.outputs) != 1:
            raise TraceError(f"the network must return one tensor, not {len(self.outputs)}")
        return self.outputs[0]


def operation_name(node: Node) -> str:
    """Return the name without overload: `add` for `aten.add.Tensor`; `own::op` outside of ATen."""
    if not isinstance(node.target, OpOverload):
        return getattr(node.target, "__name__", str(node.target))
    return schema_of(node.target).name.removeprefix("aten::")


def schema_of_node(node: Node) -> FunctionSchema:
    """Return the schema of a node's operation: its name, arguments and returns."""
    assert isinstance(node.target, OpOverload)
    return schema_of(node.target)


def is_view(node: Node) -> bool:
    """Return whether the value is the operation's input or a view of it, never a copy.

    `reshape` and others that may copy are not views. The schema decides, except for dropout.
    """
    if not isinstance(node.target, OpOverload) or schema_of(node.target).is_mutable:
        return False
    returns = schema_of(node.target).returns
    return gives_its_input(node) or (bool(returns) and returns[0].alias_info is not None)


def gives_its_input(node: Node) -> bool:
    """Return whether an operation returns its input itself, as dropout does in evaluation mode."""
    return operation_name(node).endswith("dropout")


def first_input(node: Node, index: int = 0) -> Node:
    """Return the node at a position among a node's arguments, by default the first."""
    source = node.args[index]
    assert isinstance(source, Node)
    return source


@functools.cache
def _argument_names(target: Any) -> tuple[str, ...]:
    return tuple(argument.name for argument in schema_of(target).arguments)


def position_of(node: Node, name: str) -> int:
    """Return the position of an argument in the operation's schema, -1 if it has no such one."""
    names = _argument_names(node.target)
    return names.index(name) if name in names else -1


def argument(node: Node, name: str, default: Any = None) -> Any:
    """Return an operation's argument by the name that its schema gives it."""
    index = position_of(node, name)
    if 0 <= index < len(node.args):
        return node.args[index]
    return node.kwargs.get(name, default)


def shape_of(node: Node) -> Sequence[int]:
    """Return the shape of a node's value in the traced batch."""
    shape: Sequence[int] = node.meta["val"].shape
    return shape
