"""Carries a plan out: channels are removed from a copy of the network, not masked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.graph.dependency import DependencyGraph, Removed, aliases_of
from secateur.runtime.module_state import copy_of, tensors_of, unwrapped

Images = Float[Tensor, "image channel *position"]


def cut(model: nn.Module, dependencies: DependencyGraph, removed: Removed) -> nn.Module:
    """A copy of `model` without the channels that are named by group and number."""
    kept = dependencies.kept_indices(removed)
    original = unwrapped(model)
    whole = tensors_of(original)
    smaller = copy_of(original, share_tensors=False)
    aliases = aliases_of(smaller)
    for module, name, index, value in attribute_values(dependencies, removed):
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


class SizeConflict(Exception):
    """Two operations want one attribute of a module to be two numbers."""


def attribute_values(
    dependencies: DependencyGraph, removed: Removed
) -> list[tuple[str, str, int | None, int]]:
    """Module, name, place and new value of each attribute that holds a number of channels."""
    count = dependencies.count_after(removed)
    found: dict[tuple[str, str, int | None], int] = {}
    for attribute in dependencies.attributes:
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
