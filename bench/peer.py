"""Torch-Pruning, used as its own examples use it, as the peer that the benches compare with."""

from __future__ import annotations

import copy
import time
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo import CLASSES

TRIALS = 7
FIRST_RATIO = 0.3
"""Leaves half of the MACs where every layer loses as much: (1 - 0.3)² is about 0.5."""
CLOSE_ENOUGH = 0.01


@dataclass(frozen=True)
class PeerCut:
    """A network that Torch-Pruning has cut, and what that took."""

    model: nn.Module
    ratio: float
    graph_seconds: float
    """The pruner's constructor, which builds the dependency graph and goes through its groups."""
    cut_seconds: float
    """One cut of all groups, with their importance."""


def heads(model: nn.Module) -> list[nn.Module]:
    """The layers that write the classes, which must stay whole."""
    return [
        module
        for module in model.modules()
        if (isinstance(module, nn.Linear) and module.out_features == CLASSES)
        or (isinstance(module, nn.Conv2d) and module.out_channels == CLASSES)
    ]


def cut(model: nn.Module, image: Tensor, ratio: float) -> PeerCut:
    """A copy of `model` from which every group has lost `ratio` of its channels, by their L2 norm.

    Raises whatever Torch-Pruning raises.
    """
    import torch_pruning as tp

    smaller = copy.deepcopy(model)
    with warnings.catch_warnings(action="ignore"):
        start = time.perf_counter()
        pruner = tp.pruner.MagnitudePruner(
            smaller,
            example_inputs=image,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            global_pruning=False,
            pruning_ratio=ratio,
            ignored_layers=heads(smaller),
            # By default pruners share these, and with them every network ever pruned.
            in_channel_groups={},
            out_channel_groups={},
            num_heads={},
        )
        built = time.perf_counter()
        pruner.step()
        end = time.perf_counter()
    return PeerCut(smaller, ratio, built - start, end - built)


def build_graph(model: nn.Module, image: Tensor) -> None:
    """Builds Torch-Pruning's dependency graph of `model`, and nothing more."""
    import torch_pruning as tp

    with warnings.catch_warnings(action="ignore"):
        tp.DependencyGraph().build_dependency(model, example_inputs=image)


def macs(model: nn.Module, image: Tensor) -> float:
    """Multiply-accumulates by Torch-Pruning's own count."""
    import torch_pruning as tp

    with torch.no_grad():
        count, _ = tp.utils.count_ops_and_params(model, image)
    return float(count)
