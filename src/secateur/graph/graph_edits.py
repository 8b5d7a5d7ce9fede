"""New operations in a traced graph."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.fx.graph import Graph
from torch.fx.node import Node, map_arg

from secateur.runtime.torch_internals import FakeTensor


def call_like(
    graph: Graph, like: Node, target: Callable[..., Any], *args: Any, **kwargs: Any
) -> Node:
    """Return a new node, with its value, that says it was called where another one was."""
    node = graph.call_function(target, args, kwargs)
    node.meta = {**like.meta}
    values = [source.meta["val"] for source in node.all_input_nodes]
    modes = (value.fake_mode for value in values if isinstance(value, FakeTensor))
    fake_args, fake_kwargs = map_arg((args, kwargs), lambda source: source.meta["val"])
    with next(modes, nullcontext()), torch.no_grad():
        node.meta["val"] = target(*fake_args, **fake_kwargs)
    return node
