"""Where a network uses each kernel, and which kernels can be estimated from that."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx.node import Node

from secateur.graph.channel_ids import Layer
from secateur.graph.dependency import DependencyGraph
from secateur.graph.network_graph import NetworkGraph, argument, operation_name
from secateur.graph.residual_branches import ResidualBranch


def uses_by_kernel(
    dependencies: DependencyGraph, dropped: Iterable[ResidualBranch] = ()
) -> dict[str, list[Layer]]:
    """Return the layers that use each kernel, in the order of execution.

    Those of `dropped` branches are left out.
    """
    gone = frozenset[str]().union(*(branch.tensors for branch in dropped))
    uses: dict[str, list[Layer]] = {}
    for layer in dependencies.layers:
        if layer.weight in gone:
            continue
        uses.setdefault(layer.weight, []).append(layer)
    return uses


def why_not_refitted(graph: NetworkGraph, uses: list[Layer]) -> str:
    """Return why a kernel can't be estimated from the inputs of its uses; empty if it can."""
    if uses[0].is_computed:
        return "its kernel is computed in the forward"
    if uses[0].weight not in graph.tensor_names.values():
        return "its kernel is not a parameter"
    operation = operation_name(uses[0].node)
    if operation != "linear" and not operation.startswith("conv"):
        return f"{operation} is neither a convolution nor a linear layer"
    kernel = uses[0].node.args[1]
    assert isinstance(kernel, Node)
    nodes = [use.node for use in uses]
    if any(user not in nodes or user.args.count(kernel) > 1 for user in kernel.users):
        return "its kernel is used elsewhere, too"
    if len({(operation_name(node), argument(node, "groups", 1)) for node in nodes}) > 1:
        return "its kernel is used by different operations"
    for node in nodes:
        source = node.args[0]
        assert isinstance(source, Node)
        if source is not graph.image and source.op != "call_function":
            return "its input does not depend on the images"
        bias = argument(node, "bias")
        if isinstance(bias, Node) and bias not in graph.tensor_names:
            return "its bias is computed in the forward"
        shapes = [value.meta["val"].shape for value in (source, node)]
        if any(shape[0] % graph.images for shape in shapes) or shapes[0][0] != shapes[1][0]:
            return "the first dimension of its input is not that of the images"
        if operation_name(node) != "linear" and len(shapes[0]) != kernel.meta["val"].dim():
            return "its input has no image dimension"
    return ""
