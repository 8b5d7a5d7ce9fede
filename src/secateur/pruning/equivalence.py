"""Check that the cut network equals the masked original, and that no tensor is NaN or Inf.

The masked original is the original network with the removed channels zeroed where they are read.
Kernels that the cut network replaces by two have the product of these, and residual branches that
it lacks have its constants as their output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.fx.node import Node

from secateur.graph.channel_ids import Axes
from secateur.graph.dependency import DependencyGraph
from secateur.graph.factorisation import tensors_with_products
from secateur.graph.interpreter import GraphInterpreter, apply
from secateur.graph.module_state import copy_of, tensors_of
from secateur.graph.network_graph import Compute
from secateur.models.divergence import relative_error
from secateur.pruning.apply import apply_plan, dropped_branches
from secateur.pruning.plan import PruningPlan
from secateur.runtime.device import full_float32, sums_device
from secateur.runtime.errors import CutError

TOLERANCE = 1e-4
"""Largest relative error that counts as rounding."""

Images = Float[Tensor, "image channel *position"]


@full_float32()
def check_equivalence(
    model: nn.Module,
    dependencies: DependencyGraph,
    plan: PruningPlan,
    smaller: nn.Module,
    images: Images,
) -> float:
    """Return the largest relative error of `smaller` against the masked original, on `images`.

    If the error is more than rounding in float32, both networks are computed again in float64.
    Raises `CutError` if it is too large there, too. The error names the layer whose filters alone
    cause it, if there is one.
    """
    error = _error(model, dependencies, plan, smaller, images)
    if error <= TOLERANCE:
        return error
    device = sums_device(images.device)
    double, images = copy_of(model, share_tensors=False).to(device).double(), images.to(device)

    def error_in_float64(plan: PruningPlan) -> float:
        smaller = apply_plan(double, dependencies, plan)
        return _error(double, dependencies, plan, smaller, images.double())

    if error_in_float64(plan) <= TOLERANCE:
        return error
    nothing = replace(plan, removed={}, ranks={}, dropped=())
    parts = [
        (f"removing the filters of {name}", name, replace(nothing, removed={name: filters}))
        for name, filters in plan.removed.items()
    ]
    parts += [
        (f"splitting {name} in two", name, replace(nothing, ranks={name: rank}))
        for name, rank in plan.ranks.items()
    ]
    parts += [
        (f"dropping the branch of {name}", f"{name}*", replace(nothing, dropped=(name,)))
        for name in plan.dropped
    ]
    for what, name, part in parts:
        if not error_in_float64(part) <= TOLERANCE:
            raise CutError(
                f"after {what} the outputs differ from the masked original "
                f"(relative error {error:.1e}); use --exclude {name!r} to keep it as it is"
            )
    raise CutError(
        "after removing the filters of all layers together the outputs differ from the masked "
        f"original (relative error {error:.1e}); no single layer causes this"
    )


def _error(
    model: nn.Module,
    dependencies: DependencyGraph,
    plan: PruningPlan,
    smaller: nn.Module,
    images: Images,
) -> float:
    with torch.inference_mode():
        products = tensors_with_products(smaller, plan.ranks)
        kernels = {name: products[f"{name}.weight"] for name in plan.ranks}
        constants = {
            branch.constant: smaller.get_parameter(branch.constant)
            for branch in dropped_branches(model, dependencies, plan)
        }
        expected = masked_network(model, dependencies, plan, kernels, constants)(images)
        return relative_error(smaller.eval()(images), expected)


def masked_network(
    model: nn.Module,
    dependencies: DependencyGraph,
    plan: PruningPlan,
    kernels: Mapping[str, Tensor] | None = None,
    constants: Mapping[str, Tensor] | None = None,
) -> Callable[[Images], Tensor | tuple[Tensor, ...]]:
    """Return the masked original as a function of images: what the cut network must equal.

    It runs in evaluation mode, with the removed channels zeroed where they are read. Operations
    over all channels, such as layer norm, are computed over the channels that stay. `kernels` are
    those of the cut network's convolutions that differ from the original's, by name, and
    `constants` its parameters in the place of branches, by `ResidualBranch.constant`. The function
    returns a tuple if the network returns several tensors.
    """
    branches = dropped_branches(model, dependencies, plan)
    sizes = dependencies.sizes_after(plan.removed)
    stays = dependencies.kept_ids(dependencies.kept_channels(plan.removed))
    overrides: dict[Node, Compute] = {}
    for consumer in dependencies.consumers:
        is_kept = stays[consumer.channels]
        if not is_kept.all():
            mask = torch.from_numpy(is_kept)
            overrides[consumer.node] = _masking(consumer.node, mask, consumer.dim)
    for node in dependencies.mixing:
        overrides[node] = _over_kept(node, dependencies, stays, sizes.get(node, {}))
    state = tensors_of(model)
    kept = dependencies.kept_indices(plan.removed)
    for name, kernel in (kernels or {}).items():
        weight = f"{name}.weight"
        state[weight] = _with_part(state[weight], kernel, kept.get(weight, {}))
    for branch in branches:
        is_kept = stays[branch.channels]
        value = (constants or {}).get(branch.constant, torch.zeros(int(is_kept.sum())))
        state[branch.constant] = _with_removed(value, is_kept)

    def masked(images: Images) -> Tensor | tuple[Tensor, ...]:
        interpreter = GraphInterpreter(dependencies.graph, state, images, dropped=branches)
        outputs = tuple(interpreter.finish(overrides=overrides))
        return outputs[0] if len(outputs) == 1 else outputs

    return masked


def _with_part(kernel: Tensor, part: Tensor, kept: Mapping[int, npt.NDArray[np.int64]]) -> Tensor:
    """Return a kernel with the values of `part` at the indices that are kept."""
    result = kernel.clone()
    index = [torch.arange(size, device=kernel.device) for size in kernel.shape]
    for dim, indices in kept.items():
        index[dim] = torch.from_numpy(indices).to(kernel.device)
    result[torch.meshgrid(*index, indexing="ij")] = part
    return result


def _with_removed(value: Float[Tensor, "kept"], is_kept: npt.NDArray[np.bool_]) -> Tensor:
    """Return a constant with 0 for the channels that were removed."""
    result = value.new_zeros(len(is_kept))
    result[torch.from_numpy(is_kept).to(value.device)] = value
    return result


def _masking(node: Node, kept: Tensor, dim: int) -> Compute:
    """Return the operation with zeros in place of the removed channels that it reads."""

    def compute(lookup: Callable[[Node], Any]) -> Any:
        def masked(source: Node) -> Any:
            value = lookup(source)
            if source is not node.args[0]:
                return value
            shape = [1] * value.dim()
            shape[dim] = -1
            return value.masked_fill(~kept.to(value.device).reshape(shape), 0)

        return apply(node, masked, {})

    return compute


def _over_kept(
    node: Node,
    dependencies: DependencyGraph,
    stays: npt.NDArray[np.bool_],
    sizes: Mapping[int, Any],
) -> Compute:
    """Return the operation over the channels that stay, with zeros for the others in its output."""

    def scattered(value: Tensor, axes: Axes) -> Tensor:
        for dim, ids in enumerate(axes):
            if ids is not None and not stays[ids].all():
                shape = list(value.shape)
                shape[dim] = len(ids)
                index = torch.from_numpy(np.flatnonzero(stays[ids])).to(value.device)
                value = value.new_zeros(shape).index_copy(dim, index, value)
        return value

    def compute(lookup: Callable[[Node], Any]) -> Any:
        def gathered(source: Node) -> Any:
            value = lookup(source)
            for dim, ids in enumerate(dependencies.axes.get(source, ())):
                if ids is not None and not stays[ids].all():
                    index = torch.from_numpy(np.flatnonzero(stays[ids])).to(value.device)
                    value = value.index_select(dim, index)
            return value

        result = apply(node, gathered, sizes)
        if isinstance(result, Tensor):
            return scattered(result, dependencies.axes[node])
        return tuple(map(scattered, result, dependencies.multi_output_axes[node]))

    return compute
