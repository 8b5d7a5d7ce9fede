"""Feature maps at residual sums, which a network that is trained may be held to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from secateur.graph.dependency import DependencyGraph, Removed
from secateur.graph.network_graph import operation_name

SPATIAL = 4
"""Dimensions of a batch of feature maps."""


@dataclass(frozen=True, eq=False)
class ResidualSum:
    """A module whose answer is a residual sum, and what a cut leaves of it."""

    module: str
    kept: tuple[int, ...]
    """Channels of the original sum that stay."""


def residual_sums(dependencies: DependencyGraph, removed: Removed) -> tuple[ResidualSum, ...]:
    """The modules that add two feature maps, with the channels that stay; the last sum of each.

    Sums that the network adds in its own forward, outside of any module, have no name to find
    them by and are left out.
    """
    stays = dependencies.kept_ids(removed)
    found: dict[str, ResidualSum] = {}
    for node in dependencies.graph.nodes:
        if operation_name(node) != "add" or node not in dependencies.axes:
            continue
        summands = [each for each in node.args[:2] if each in dependencies.axes]
        shapes = {tuple(each.meta["val"].shape) for each in (node, *summands)}  # type: ignore[union-attr]
        ids = dependencies.axes[node][1] if len(dependencies.axes[node]) == SPATIAL else None
        stack = list(node.meta.get("nn_module_stack", {}).values())
        if len(summands) == 2 and len(shapes) == 1 and ids is not None and stack and stack[-1]:
            kept = np.flatnonzero(stays[ids]).tolist()
            found[stack[-1]] = ResidualSum(stack[-1], tuple(kept))
    return tuple(found.values())


class FeatureMaps:
    """What modules of a network answered last, by name; see `observed`."""

    def __init__(self) -> None:
        self.by_module: dict[str, Tensor] = {}


@contextlib.contextmanager
def observed(model: nn.Module, sums: tuple[ResidualSum, ...]) -> Iterator[FeatureMaps]:
    """Within the block the answers of the modules of `sums` are kept, with their gradients."""
    maps = FeatureMaps()
    hooks = []

    def watch(name: str) -> None:
        def keep(module: nn.Module, inputs: object, answer: Tensor) -> None:
            del module, inputs
            maps.by_module[name] = answer

        hooks.append(model.get_submodule(name).register_forward_hook(keep))

    for each in sums:
        watch(each.module)
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


def difference(
    sums: tuple[ResidualSum, ...], found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> Tensor:
    """Mean over the sums of the squared error of the feature maps, relative to the wanted ones.

    `wanted` are those of the network before the cut, of which the channels that stay count.
    """
    errors = []
    for each in sums:
        kept = torch.tensor(each.kept, device=wanted[each.module].device)
        target = wanted[each.module].float().index_select(1, kept)
        error = (found[each.module].float() - target).square().mean()
        errors.append(error / target.square().mean().clamp_min(torch.finfo(torch.float32).tiny))
    return torch.stack(errors).mean()
