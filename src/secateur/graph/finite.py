"""Check that no tensor of a network, and nothing that it computes, is NaN or Inf."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.fx.node import Node

from secateur.graph.call_sites import call_site
from secateur.graph.dependency import DependencyGraph
from secateur.graph.interpreter import GraphInterpreter
from secateur.graph.module_state import tensors_of
from secateur.graph.network_graph import operation_name
from secateur.runtime.error_messages import explain
from secateur.runtime.errors import NotFiniteError, TraceError

LAYERS = frozenset({"conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear", "batch_norm"})
"""Operations whose outputs must be finite; others may hold -Inf, such as attention masks."""


def check_finite(
    model: nn.Module,
    dependencies: DependencyGraph,
    images: Float[Tensor, "image channel *position"],
) -> None:
    """Raise `NotFiniteError` that names the first tensor, or the first layer, with NaN or Inf.

    Parameters and buffers of `model` are checked first, then what it computes from `images`. Raises
    `TraceError` that names the operation if the graph can't be run on so many images: the network
    keeps something that depends on the batch that it saw first.
    """
    state = tensors_of(model)
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise NotFiniteError(f"the weights hold numbers that are not finite: {name}")
    not_finite: list[Node] = []

    def check(node: Node, value: object) -> None:
        if not_finite or not isinstance(value, Tensor) or not value.is_floating_point():
            return
        is_wrong = ~value.isfinite() if operation_name(node) in LAYERS else value.isnan()
        if bool(is_wrong.any()):
            not_finite.append(node)

    with torch.inference_mode():
        interpreter = GraphInterpreter(dependencies.graph, state, images)
        nodes = dependencies.graph.nodes
        for node, following in zip(nodes, (*nodes[1:], None), strict=True):
            try:
                interpreter.advance(following, after={node: partial(check, node)})
            except RuntimeError as error:
                if explain(error) is not None:  # the machine's fault, not the network's
                    raise
                cause = " ".join(str(error).split())
                raise TraceError(
                    f"the network works for one number of images alone, that of the first batch: "
                    f"{call_site(node)}: {cause}"
                ) from error
    if not_finite:
        modules = [name for name in not_finite[0].meta.get("nn_module_stack", {}).values() if name]
        place = modules[-1] if modules else not_finite[0].name
        raise NotFiniteError(f"{place} outputs NaN or infinite values for finite images")
