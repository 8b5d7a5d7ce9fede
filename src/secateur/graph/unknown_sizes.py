"""Sizes that depend on the values of a tensor, as after `x[x > 0]`, and are not known before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.graph import Graph
from torch.fx.node import Node

UNKNOWN_SIZE = 3
"""Stands for every size that is not known."""
_MARK = "has_unknown_size"


def replace_unknown_sizes(graph: Graph) -> None:
    """Give a size to every value whose size is not known, and mark it."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if any(type(item.numel()) is not int for item in _items(value) if isinstance(item, Tensor)):
            node.meta["val"] = _with_sizes(value)
            node.meta[_MARK] = True
        elif isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            node.meta["val"] = UNKNOWN_SIZE


def has_unknown_size(node: Node) -> bool:
    """Return whether the size of an operation's value, or of one of its inputs, is not known."""
    return any(_MARK in value.meta for value in (node, *node.all_input_nodes))


def _items(value: Any) -> list[Any] | tuple[Any, ...]:
    return value if isinstance(value, list | tuple) else (value,)


def _with_sizes(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_with_sizes(item) for item in value]
    if not isinstance(value, Tensor):
        return value
    sizes = [size if type(size) is int else UNKNOWN_SIZE for size in value.shape]
    empty: Callable[..., Tensor] = torch.empty
    with value.fake_mode:  # type: ignore[attr-defined]
        return empty(sizes, dtype=value.dtype, device=value.device)
