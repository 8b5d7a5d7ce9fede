"""Torch-Pruning, used as its own examples use it, as the peer that the benches compare with."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo import CLASSES

TRIALS = 7
FIRST_RATIO = 0.3
"""Leaves half of the MACs where every layer loses as much: (1 - 0.3)² is about 0.5."""
CLOSE_ENOUGH = 0.01


CRITERIA = ("l1", "l2", "bn_scale", "lamp", "fpgm", "taylor", "hessian")
"""Its own; `importance` makes each as Torch-Pruning does by default."""


@dataclass(frozen=True)
class Settings:
    """What Torch-Pruning is told beside a ratio."""

    criterion: str = "l2"
    is_global: bool = False
    """Whether one ranking goes over all layers, or every layer loses as much."""
    whole: frozenset[str] | None = None
    """Names of the layers that keep all filters; by default those that write the classes."""


L2 = Settings()


@dataclass(frozen=True)
class PeerCut:
    """A network that Torch-Pruning has cut, and what that took."""

    model: nn.Module
    ratio: float
    graph_seconds: float
    """The pruner's constructor, which builds the dependency graph and goes through its groups."""
    cut_seconds: float
    """One cut of all groups, with their importance."""


def heads(model: nn.Module, classes: int = CLASSES) -> dict[str, nn.Module]:
    """The layers that write the classes, which must stay whole, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) and module.out_features == classes)
        or (isinstance(module, nn.Conv2d) and module.out_channels == classes)
    }


def importance(criterion: str) -> Any:
    """Torch-Pruning's object for one of `CRITERIA`; the last two look at `grad` of parameters.

    `hessian` takes there the mean over images of the squared gradient. Its own `accumulate_grad`
    keeps that of the last image alone (1.6.1).
    """
    from torch_pruning import importance as kinds

    made: dict[str, Any] = {
        "l1": kinds.GroupMagnitudeImportance(p=1),
        "l2": kinds.GroupMagnitudeImportance(p=2),
        "bn_scale": kinds.BNScaleImportance(),
        "lamp": kinds.LAMPImportance(),
        "fpgm": kinds.FPGMImportance(),
        "taylor": kinds.GroupTaylorImportance(),
        "hessian": kinds.GroupHessianImportance(),
    }
    return made[criterion]


def cut(
    model: nn.Module,
    image: Tensor,
    ratio: float,
    settings: Settings = L2,
    *,
    ratios: Mapping[str, float] | None = None,
    gradients: Mapping[str, Tensor] | None = None,
) -> PeerCut:
    """A copy of `model` from which every group has lost `ratio` of its channels.

    `ratios` says otherwise for some layers, by name; `gradients` are what criteria find in `grad`
    of the parameters. Raises whatever Torch-Pruning raises.
    """
    import torch_pruning as tp

    smaller = copy.deepcopy(model)
    for name, parameter in smaller.named_parameters():
        parameter.grad = gradients[name].clone() if gradients else None
    layers = dict(smaller.named_modules())
    whole = heads(smaller) if settings.whole is None else settings.whole
    with warnings.catch_warnings(action="ignore"):
        start = time.perf_counter()
        pruner = tp.pruner.MagnitudePruner(
            smaller,
            example_inputs=image,
            importance=importance(settings.criterion),
            global_pruning=settings.is_global,
            pruning_ratio=ratio,
            pruning_ratio_dict={layers[name]: each for name, each in (ratios or {}).items()},
            ignored_layers=[layers[name] for name in whole],
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
