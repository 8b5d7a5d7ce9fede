"""A traced network as a value: its operations, and how to read one of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import Node

from secateur.errors import TraceError

NodeHook = Callable[[Tensor], Tensor | None]


Tensors = Mapping[str, Tensor]


Forward = Callable[[Any, Tensor], Any]
"""What is traced of a network: `forward(model, images)` gives a tensor or several."""


Sizes = Mapping[Node, Mapping[int, Any]]
"""Arguments of operations, by position, that differ from those in the graph."""


Compute = Callable[[Callable[[Node], Any]], Any]
"""An operation's value, from a function that gives the values of what it reads."""


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
    outputs: tuple[Node, ...]
    """The nodes whose values the network returns, in the order of its flattened answer."""
    last_use: dict[Node, Node]
    """Value -> the last node that reads it."""
    images: int
    """Images in the batch that was traced; sizes in the graph that depend on it are multiples."""

    @property
    def output(self) -> Node:
        """The node whose value the network returns; raises `TraceError` where there are several."""
        if len(self.outputs) != 1:
            raise TraceError(f"the network must return one tensor, not {len(self.outputs)}")
        return self.outputs[0]


def is_view(node: Node) -> bool:
    """Whether an operation gives what it reads, or a view of it; `reshape` and others may copy.

    Its schema says so, but for dropout.
    """
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
        return False
    returns = node.target._schema.returns
    return gives_its_input(node) or (bool(returns) and returns[0].alias_info is not None)


def gives_its_input(node: Node) -> bool:
    """Whether an operation gives the very value that it reads, as dropout outside of training."""
    return operation_name(node).endswith("dropout")


def operation_name(node: Node) -> str:
    """Name without overload: `add` for `aten.add.Tensor`, `own::op` outside of ATen."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return getattr(node.target, "__name__", str(node.target))
    return node.target._schema.name.removeprefix("aten::")


def first_input(node: Node, index: int = 0) -> Node:
    """The node at a position among a node's arguments, by default the first."""
    source = node.args[index]
    assert isinstance(source, Node)
    return source


@functools.cache
def _argument_names(target: Any) -> tuple[str, ...]:
    return tuple(argument.name for argument in target._schema.arguments)


def position_of(node: Node, name: str) -> int:
    """Position of an argument in the operation's schema; -1 where it has none of that name."""
    names = _argument_names(node.target)
    return names.index(name) if name in names else -1


def argument(node: Node, name: str, default: Any = None) -> Any:
    """An operation's argument by the name that its schema gives it."""
    index = position_of(node, name)
    if 0 <= index < len(node.args):
        return node.args[index]
    return node.kwargs.get(name, default)


def shape_of(node: Node) -> Sequence[int]:
    """Shape of a node's value in the traced batch."""
    shape: Sequence[int] = node.meta["val"].shape
    return shape
