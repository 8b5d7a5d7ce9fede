"""The law that every cut must keep, and numbers that are none: found before anyone relies on them.

The cut network answers as the original does with the removed channels silenced where they are read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.fx.node import Node

from secateur.errors import CutError, NotFiniteError
from secateur.evaluation.divergence import relative_error
from secateur.graph.channel_ids import Axes
from secateur.graph.dependency import DependencyGraph
from secateur.graph.interpreter import GraphInterpreter, apply
from secateur.graph.trace import Compute, operation_name
from secateur.pruning.apply import apply_plan
from secateur.pruning.plan import PruningPlan
from secateur.runtime.module_state import tensors_of, unwrapped

TOLERANCE = 1e-4
"""Largest relative difference that rounding may make."""
LAYERS = frozenset({"conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear", "batch_norm"})
"""Operations whose values are finite in a sound network; masks of attention, say, hold -Inf."""

Images = Float[Tensor, "image channel *position"]


def check_equivalence(
    model: nn.Module,
    dependencies: DependencyGraph,
    plan: PruningPlan,
    smaller: nn.Module,
    images: Images,
) -> float:
    """The largest relative difference between `smaller` and the original, silenced, on `images`.

    Where it is more than rounding makes in float32, both are computed in float64. Raises `CutError`
    where it is too large there, too: it names the layer whose filters alone are enough for that.
    """
    error = _error(model, dependencies, plan, smaller, images)
    if error <= TOLERANCE:
        return error
    twice = copy.deepcopy(unwrapped(model)).double()
    if (
        _error(twice, dependencies, plan, apply_plan(twice, dependencies, plan), images.double())
        <= TOLERANCE
    ):
        return error
    for name, removed in plan.removed.items():
        alone = PruningPlan({name: removed}, plan.budget, plan.criterion)
        cut = apply_plan(twice, dependencies, alone)
        if not _error(twice, dependencies, alone, cut, images.double()) <= TOLERANCE:
            raise CutError(
                f"without filters of {name} the network answers otherwise than with them silenced "
                f"(relative difference {error:.1e}): this cut can't be trusted. --exclude {name!r} "
                "keeps them"
            )
    raise CutError(
        "without the filters of all layers together the network answers otherwise than with them "
        f"silenced (relative difference {error:.1e}): this cut can't be trusted"
    )


def _error(
    model: nn.Module,
    dependencies: DependencyGraph,
    plan: PruningPlan,
    smaller: nn.Module,
    images: Images,
) -> float:
    with torch.inference_mode():
        expected = masked_overrides(model, dependencies, plan)(images)
        return relative_error(smaller.eval()(images), expected)


def check_finite(model: nn.Module, dependencies: DependencyGraph, images: Images) -> None:
    """Raises `NotFiniteError` that names the first tensor, or the first layer, with NaN or Inf.

    Of the parameters and buffers of `model`, then of what it computes from `images`.
    """
    state = tensors_of(unwrapped(model))
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise NotFiniteError(f"the weights hold numbers that are not finite: {name}")
    found: list[Node] = []

    def look(node: Node, value: object) -> None:
        if found or not isinstance(value, Tensor) or not value.is_floating_point():
            return
        is_wrong = ~value.isfinite() if operation_name(node) in LAYERS else value.isnan()
        if bool(is_wrong.any()):
            found.append(node)

    with torch.inference_mode():
        walk = GraphInterpreter(dependencies.graph, state, images)
        walk.advance(after={node: partial(look, node) for node in dependencies.graph.nodes})
    if found:
        stack = [name for name in found[0].meta.get("nn_module_stack", {}).values() if name]
        place = stack[-1] if stack else found[0].name
        raise NotFiniteError(f"{place} gives numbers that are not finite, of images that are")


def masked_overrides(
    model: nn.Module, dependencies: DependencyGraph, plan: PruningPlan
) -> Callable[[Images], Tensor | tuple[Tensor, ...]]:
    """The original network, in evaluation mode, with the removed channels zeroed where read.

    It is what the cut network must equal: the reference that tests and runs compare with. An
    operation over all channels, such as layer norm, is computed over those that stay: there the
    reference is a masked normalisation. Gives a tuple where the network returns several tensors.
    """
    sizes, stays = dependencies.sizes_after(plan.removed), dependencies.is_kept(plan.removed)
    edits: dict[Node, Compute] = {}
    for reader in dependencies.consumers:
        kept = stays[reader.channels]
        if not kept.all():
            edits[reader.node] = _masking(reader.node, torch.from_numpy(kept), reader.dim)
    for node in dependencies.mixing:
        edits[node] = _weighted_over_kept(node, dependencies, stays, sizes.get(node, {}))
    state = tensors_of(unwrapped(model))

    def silenced(images: Images) -> Tensor | tuple[Tensor, ...]:
        walk = GraphInterpreter(dependencies.graph, state, images)
        walk.advance(overrides=edits)
        outputs = tuple(walk.value(node) for node in dependencies.graph.outputs)
        return outputs[0] if len(outputs) == 1 else outputs

    return silenced


def _masking(node: Node, kept: Tensor, dim: int) -> Compute:
    """The operation with zeros in place of the removed channels that it reads."""

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


def _weighted_over_kept(
    node: Node,
    dependencies: DependencyGraph,
    stays: npt.NDArray[np.bool_],
    sizes: Mapping[int, Any],
) -> Compute:
    """The operation over the channels that stay, with zeros for the others in its answer."""

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
        return tuple(map(scattered, result, dependencies.several[node]))

    return compute
