"""Carries a plan out: channels are removed from a copy of the network, not masked."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.fx.node import Node

from secateur.errors import RunFolderError
from secateur.graph import Tap, operation_name, run, tensors_of
from secateur.plan import PruningPlan
from secateur.wiring import Wiring, aliases_of

Images = Float[Tensor, "image rgb height width"]


def apply_plan(model: nn.Module, wiring: Wiring, plan: PruningPlan) -> nn.Module:
    """A copy of `model` without the filters that the plan removes, wherever they reach.

    Mode, hooks, dtype, memory format and `requires_grad` are those of `model`, which is not
    changed. Raises `RunFolderError` where the plan names a group or filter that `wiring` lacks.
    """
    check_plan(wiring, plan)
    smaller = copy.deepcopy(model)
    aliases = aliases_of(smaller)
    tensors = tensors_of(smaller)
    done: set[str] = set()
    for name, dims in wiring.kept_indices(plan.removed).items():
        if name in done:
            continue
        tensor = tensors[name]
        for dim, indices in dims.items():
            tensor = tensor.index_select(dim, torch.from_numpy(indices).to(tensor.device))
        if tensors[name].dim() == 4 and tensors[name].is_contiguous(
            memory_format=torch.channels_last
        ):
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        _replace(smaller, aliases[name], tensor)
        done.update(aliases[name])
    return smaller


def check_plan(wiring: Wiring, plan: PruningPlan) -> None:
    """Raises `RunFolderError` where the plan does not fit the network, or empties a layer."""
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
    if isinstance(module, nn.modules.conv._ConvNd) and not module.transposed:
        out_channels, in_channels_a_group = module.weight.shape[:2]
        if module.groups > 1 and module.groups == module.in_channels:  # depthwise
            module.groups = out_channels
        module.out_channels = out_channels
        module.in_channels = in_channels_a_group * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase) and module.weight is not None:
        module.num_features = module.weight.shape[0]


def silence(model: nn.Module, wiring: Wiring, plan: PruningPlan) -> Callable[[Images], Tensor]:
    """The original network, in evaluation mode, with the removed channels zeroed where read.

    It is what the cut network must equal: the reference that tests and runs compare with.
    """
    kept = wiring.channels_kept(plan.removed)
    slots = {slots.tensor: slots.channels for slots in wiring.slots if slots.dim == 1}
    edits: dict[Node, Tap] = {}
    for group in wiring.groups.values():
        for reader in group.readers:
            channels = slots[reader.weight]
            mask = torch.from_numpy((channels < 0) | kept[channels])
            dim = -1 if operation_name(reader.node) == "linear" else 1
            edits[reader.node] = _masking(mask, dim)
    state = tensors_of(model)
    return lambda images: run(wiring.graph, state, images, before=edits)


def _masking(mask: Tensor, dim: int) -> Tap:
    def edit(value: Tensor) -> Tensor:
        shape = [1] * value.dim()
        shape[dim] = -1
        return value * mask.to(value).reshape(shape)

    return edit


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute expected value."""
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
