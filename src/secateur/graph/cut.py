"""Carries a plan out: channels are removed from a copy of the network, not masked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.fx.node import Node

from secateur.errors import RunFolderError
from secateur.graph.channel_ids import Axes
from secateur.graph.dependency import Removed, Wiring, aliases_of
from secateur.graph.trace import Compute, Walk, apply, copy_of, tensors_of
from secateur.pruning.plan import PruningPlan
from secateur.runtime.hashing import architecture_hash

Images = Float[Tensor, "image channel *position"]


def apply_plan(model: nn.Module, wiring: Wiring, plan: PruningPlan) -> nn.Module:
    """A copy of `model` without the filters that the plan removes, wherever they reach.

    Mode, hooks, dtype, memory format and `requires_grad` are those of `model`, which is not
    changed; of a compiled network it is the original that is copied. Raises `RunFolderError` where
    the plan was made for another network, or names a group or filter that `wiring` lacks.
    """
    check_plan(wiring, plan)
    return cut(model, wiring, plan.removed)


def cut(model: nn.Module, wiring: Wiring, removed: Removed) -> nn.Module:
    """A copy of `model` without the channels that are named by group and number."""
    kept = wiring.kept_indices(removed)
    original = getattr(model, "_orig_mod", model)
    whole = tensors_of(original)
    smaller = copy_of(original, share_tensors=False)
    aliases = aliases_of(smaller)
    for module, name, index, value in attribute_values(wiring, removed):
        _set_attribute(smaller.get_submodule(module), name, index, value)
    done: set[str] = set()
    for name, dims in kept.items():
        if name not in done:
            _replace(smaller, aliases[name], _select(whole[name], dims))
            done.update(aliases[name])
    return smaller


def _select(tensor: Tensor, dims: Mapping[int, Any]) -> Tensor:
    """The indices that stay, in the tensor's own memory format."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    wanted = formats.get(tensor.dim(), torch.contiguous_format)
    is_special = not tensor.is_contiguous() and tensor.is_contiguous(memory_format=wanted)
    result = tensor
    for dim, indices in dims.items():
        result = result.index_select(dim, torch.from_numpy(indices).to(tensor.device))
    return result.contiguous(memory_format=wanted if is_special else torch.contiguous_format)


def check_plan(wiring: Wiring, plan: PruningPlan) -> None:
    """Raises `RunFolderError` where the plan does not fit the network, or empties a layer."""
    if plan.architecture not in (None, architecture_hash(wiring.shapes)):
        raise RunFolderError(
            "the plan was made for another network: the layers of this one have other names or "
            "other sizes"
        )
    for name, filters in plan.removed.items():
        if name not in wiring.groups:
            raise RunFolderError(f"the plan cuts {name!r}, which the network can't lose filters of")
        size = len(wiring.groups[name])
        if not all(isinstance(f, int) and 0 <= f < size for f in filters):
            raise RunFolderError(
                f"the plan cuts filters that {name!r} does not have (0 to {size - 1})"
            )
        if len(set(filters)) != len(filters) or len(filters) >= size:
            raise RunFolderError(f"the plan cuts all {size} filters of {name!r}, or some twice")
    kept = wiring.channels_kept(plan.removed)
    emptied = next((cover for cover in wiring.covers if not kept[cover].any()), None)
    if emptied is not None:
        owner = next(n for n, group in wiring.groups.items() if emptied[0] in group.channels)
        raise RunFolderError(f"the plan leaves nothing of a part of {owner!r} that is read alone")


class SizeConflict(Exception):
    """Two operations want one attribute of a module to be two numbers."""


def attribute_values(wiring: Wiring, removed: Removed) -> list[tuple[str, str, int | None, int]]:
    """Module, name, place and new value of each attribute that holds a number of channels."""
    count = wiring.count_after(removed)
    found: dict[tuple[str, str, int | None], int] = {}
    for attribute in wiring.attributes:
        key, value = (attribute.module, attribute.name, attribute.index), attribute.size(count)
        if found.setdefault(key, value) != value:
            raise SizeConflict(".".join(str(part) for part in key))
    return [(*key, value) for key, value in found.items()]


def _set_attribute(module: nn.Module, name: str, index: int | None, value: int) -> None:
    if index is not None:
        held = getattr(module, name)
        items = [*held[:index], value, *held[index + 1 :]]
        setattr(module, name, items if isinstance(held, list) else tuple(items))
    else:
        setattr(module, name, value)


def _replace(model: nn.Module, names: tuple[str, ...], tensor: Tensor) -> None:
    """Puts one new tensor at each of its names and corrects the modules' own attributes."""
    first: Tensor | None = None
    for name in names:
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        old = getattr(owner, attribute)
        if first is None:
            is_parameter = isinstance(old, nn.Parameter)
            first = (
                nn.Parameter(tensor, requires_grad=old.requires_grad) if is_parameter else tensor
            )
        setattr(owner, attribute, first)
        _correct_attributes(owner)


def _correct_attributes(module: nn.Module) -> None:
    """Sets what torch's own modules say of their sizes by the shape of their weight."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return
    if isinstance(module, nn.modules.conv._ConvNd):
        one, other = weight.shape[:2]
        if module.transposed:
            module.in_channels, module.out_channels = one, other * module.groups
        else:
            module.out_channels, module.in_channels = one, other * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = weight.shape[0]
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = weight.shape[0]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = weight.shape[0]


def silence(
    model: nn.Module, wiring: Wiring, plan: PruningPlan
) -> Callable[[Images], Tensor | tuple[Tensor, ...]]:
    """The original network, in evaluation mode, with the removed channels zeroed where read.

    It is what the cut network must equal: the reference that tests and runs compare with. An
    operation over all channels, such as layer norm, is computed over those that stay: there the
    reference is a masked normalisation. Gives a tuple where the network returns several tensors.
    """
    sizes, stays = wiring.sizes_after(plan.removed), wiring.stays(plan.removed)
    edits: dict[Node, Compute] = {}
    for reader in wiring.readers:
        kept = stays[reader.channels]
        if not kept.all():
            edits[reader.node] = _masking(reader.node, torch.from_numpy(kept), reader.dim)
    for node in wiring.mixing:
        edits[node] = _over_kept(node, wiring, stays, sizes.get(node, {}))
    state = tensors_of(getattr(model, "_orig_mod", model))

    def silenced(images: Images) -> Tensor | tuple[Tensor, ...]:
        walk = Walk(wiring.graph, state, images)
        walk.advance(instead=edits)
        outputs = tuple(walk.value(node) for node in wiring.graph.outputs)
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


def _over_kept(
    node: Node, wiring: Wiring, stays: npt.NDArray[np.bool_], sizes: Mapping[int, Any]
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
            for dim, ids in enumerate(wiring.axes.get(source, ())):
                if ids is not None and not stays[ids].all():
                    index = torch.from_numpy(np.flatnonzero(stays[ids])).to(value.device)
                    value = value.index_select(dim, index)
            return value

        result = apply(node, gathered, sizes)
        if isinstance(result, Tensor):
            return scattered(result, wiring.axes[node])
        return tuple(map(scattered, result, wiring.several[node]))

    return compute


def relative_error(
    found: Tensor | tuple[Tensor, ...], expected: Tensor | tuple[Tensor, ...]
) -> float:
    """Largest absolute difference over the largest absolute expected value.

    Of several tensors the worst.
    """
    if not isinstance(found, Tensor):
        return max(map(relative_error, found, expected))
    assert isinstance(expected, Tensor)
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
