"""Feature distillation: train a network towards the original's feature maps at residual sums."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from secateur.graph.dependency import DependencyGraph, Removed
from secateur.graph.network_graph import operation_name
from secateur.graph.residual_branches import ResidualBranch

SPATIAL = 4
"""Dimensions of a batch of feature maps: [image, channel, height, width]."""


@dataclass(frozen=True, eq=False)
class ResidualSum:
    """A module whose output is a residual sum, and the channels of it that a cut keeps."""

    module: str
    kept: tuple[int, ...]
    """Channels of the original sum."""


def residual_sums(
    dependencies: DependencyGraph, removed: Removed, dropped: Sequence[ResidualBranch] = ()
) -> tuple[ResidualSum, ...]:
    """Return the modules that add two feature maps, with the channels that `removed` keeps.

    A module with several sums counts with its last one. Sums in the network's own forward, outside
    of any module, have no module name and are left out. So are those inside a dropped branch, and
    those before it: the layers before have taken over the branch's work.
    """
    shortcuts = {branch.shortcut for branch in dropped}
    gone = {node for branch in dropped for node in branch.nodes}
    is_kept = dependencies.kept_ids(dependencies.kept_channels(removed))
    sums: dict[str, ResidualSum] = {}
    for node in dependencies.graph.nodes:
        if operation_name(node) != "add" or node not in dependencies.axes:
            continue
        summands = [summand for summand in node.args[:2] if summand in dependencies.axes]
        shapes = {tuple(value.meta["val"].shape) for value in (node, *summands)}  # type: ignore[union-attr]
        ids = dependencies.axes[node][1] if len(dependencies.axes[node]) == SPATIAL else None
        if node in gone or not shortcuts.isdisjoint((node, *node.users)):
            continue
        stack = list(node.meta.get("nn_module_stack", {}).values())
        if len(summands) == 2 and len(shapes) == 1 and ids is not None and stack and stack[-1]:
            kept = np.flatnonzero(is_kept[ids]).tolist()
            sums[stack[-1]] = ResidualSum(stack[-1], tuple(kept))
    return tuple(sums.values())


class FeatureMaps:
    """The last outputs of modules, by name; see `observe`."""

    def __init__(self) -> None:
        self.by_module: dict[str, Tensor] = {}


@contextlib.contextmanager
def observe(model: nn.Module, sums: tuple[ResidualSum, ...]) -> Iterator[FeatureMaps]:
    """Record the outputs of the modules of `sums` within a block, with their gradients."""
    maps = FeatureMaps()
    hooks = []

    def add_hook(name: str) -> None:
        def record(module: nn.Module, inputs: object, output: Tensor) -> None:
            del module, inputs
            maps.by_module[name] = output

        hooks.append(model.get_submodule(name).register_forward_hook(record))

    for residual_sum in sums:
        add_hook(residual_sum.module)
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


def relative_feature_error(
    sums: tuple[ResidualSum, ...], maps: Mapping[str, Tensor], original: Mapping[str, Tensor]
) -> Tensor:
    """Return the relative squared error of feature maps, averaged over the sums.

    `original` are the maps before the cut, of which only the kept channels are compared.
    """
    errors = []
    for residual_sum in sums:
        name = residual_sum.module
        kept = torch.tensor(residual_sum.kept, device=original[name].device)
        target = original[name].float().index_select(1, kept)
        error = (maps[name].float() - target).square().mean()
        errors.append(error / target.square().mean().clamp_min(torch.finfo(torch.float32).tiny))
    return torch.stack(errors).mean()
