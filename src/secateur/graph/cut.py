"""Cuts a network: removes channels physically, from a copy; nothing is masked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.graph.dependency import DependencyGraph, Removed, aliases_of
from secateur.graph.module_state import copy_of, owner_of, tensors_of
from secateur.graph.weight_norm import with_kernels
from secateur.runtime.torch_internals import BatchOrInstanceNorm, Convolution, recompute_kernels


def cut(model: nn.Module, dependencies: DependencyGraph, removed: Removed) -> nn.Module:
    """Return a copy of `model` without the channels `removed`."""
    kept = dependencies.kept_indices(removed)
    tensors = tensors_of(model)
    norms = [norm for norm in dependencies.weight_norms if norm.direction in kept]
    kernels = with_kernels(norms, tensors)
    smaller = copy_of(model, share_tensors=False)
    aliases = aliases_of(smaller)
    for module, name, index, value in attribute_values(dependencies, removed):
        _set_attribute(smaller.get_submodule(module), name, index, value)
    cut_tensors = {name: _select(kernels[name], dims) for name, dims in kept.items()}
    for norm in norms:
        cut_tensors.update(norm.parts(cut_tensors[norm.direction]))
    replaced: dict[str, None] = {}
    for name, tensor in cut_tensors.items():
        if name not in replaced:
            _replace_tensor(smaller, aliases[name], tensor)
            replaced.update(dict.fromkeys(aliases[name]))
    with torch.no_grad():
        for layer in dict.fromkeys(map(owner_of, replaced)):
            _update_to_tensors(smaller.get_submodule(layer))
    return smaller


def _select(tensor: Tensor, dims: Mapping[int, Any]) -> Tensor:
    """Return the tensor's kept indices, in its own memory format."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    channels_last = formats.get(tensor.dim(), torch.contiguous_format)
    is_channels_last = not tensor.is_contiguous() and tensor.is_contiguous(
        memory_format=channels_last
    )
    result = tensor
    for dim, indices in dims.items():
        result = result.index_select(dim, torch.from_numpy(indices).to(tensor.device))
    return result.contiguous(
        memory_format=channels_last if is_channels_last else torch.contiguous_format
    )


class SizeConflict(Exception):
    """Two operations need different values of the same attribute of a module."""


def attribute_values(
    dependencies: DependencyGraph, removed: Removed
) -> list[tuple[str, str, int | None, int]]:
    """Return module, name, index and new value of each attribute that holds a number of channels.

    Raises `SizeConflict` if an attribute would need two values.
    """
    count = dependencies.count_after(removed)
    values: dict[tuple[str, str, int | None], int] = {}
    for attribute in dependencies.attributes:
        key, value = (attribute.module, attribute.name, attribute.index), attribute.size(count)
        if values.setdefault(key, value) != value:
            raise SizeConflict(".".join(str(part) for part in key))
    return [(*key, value) for key, value in values.items()]


def _set_attribute(module: nn.Module, name: str, index: int | None, value: int) -> None:
    if index is not None:
        old = getattr(module, name)
        items = [*old[:index], value, *old[index + 1 :]]
        setattr(module, name, items if isinstance(old, list) else tuple(items))
    else:
        setattr(module, name, value)


def _replace_tensor(model: nn.Module, names: tuple[str, ...], tensor: Tensor) -> None:
    """Replace a tensor under each of its names."""
    replacement: Tensor | None = None
    for name in names:
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        old = getattr(owner, attribute)
        if replacement is None:
            is_parameter = isinstance(old, nn.Parameter)
            replacement = (
                nn.Parameter(tensor, requires_grad=old.requires_grad) if is_parameter else tensor
            )
        setattr(owner, attribute, replacement)


def _update_to_tensors(module: nn.Module) -> None:
    """Update what a module derives from its tensors: computed kernels, and size attributes."""
    recompute_kernels(module)
    if isinstance(module, nn.RNNBase):
        module.input_size = module.get_parameter("weight_ih_l0").shape[1]
    elif isinstance(module, nn.RNNCellBase):
        module.input_size = module.weight_ih.shape[1]
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return
    if isinstance(module, Convolution):
        rows, columns = weight.shape[:2]
        if module.transposed:
            module.in_channels, module.out_channels = rows, columns * module.groups
        else:
            module.out_channels, module.in_channels = rows, columns * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, BatchOrInstanceNorm):
        module.num_features = weight.shape[0]
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = weight.shape[0]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = weight.shape[0]
