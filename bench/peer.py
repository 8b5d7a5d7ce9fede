"""Torch-Pruning, used as in its examples, which the benches compare secateur with."""

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
"""Leaves about half of the MACs if every layer is pruned alike: (1 - 0.3)² is about 0.5."""
CLOSE_ENOUGH = 0.01


CRITERIA = ("l1", "l2", "bn_scale", "lamp", "fpgm", "taylor", "hessian")
"""Criteria of Torch-Pruning; `importance` makes each with its defaults."""


@dataclass(frozen=True)
class Settings:
    """Settings of Torch-Pruning, without the ratio."""

    criterion: str = "l2"
    is_global: bool = False
    """Whether all layers are ranked together, or every layer is pruned by the same ratio."""
    whole: frozenset[str] | None = None
    """Names of the layers that keep all filters; by default those that produce the logits."""


L2 = Settings()


@dataclass(frozen=True)
class PeerCut:
    """A network pruned by Torch-Pruning, and the seconds it took."""

    model: nn.Module
    ratio: float
    graph_seconds: float
    """The pruner's constructor, which builds the dependency graph and goes through its groups."""
    cut_seconds: float
    """One cut of all groups, with their importance."""


def heads(model: nn.Module, classes: int = CLASSES) -> dict[str, nn.Module]:
    """Return the layers that produce the logits, which keep all filters, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) and module.out_features == classes)
        or (isinstance(module, nn.Conv2d) and module.out_channels == classes)
    }


def importance(criterion: str) -> Any:
    """Return Torch-Pruning's object for one of `CRITERIA`; the last two use `grad` of parameters.

    For `hessian` that is the mean of the squared gradient over images. Torch-Pruning's own
    `accumulate_grad` keeps only the last image's (1.6.1).
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
    """Return a copy of `model` with `ratio` of the channels removed from every group.

    `ratios` overrides the ratio of layers, by name; `gradients` become the `grad` of parameters.
    Raises whatever Torch-Pruning raises.
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
            pruning_ratio_dict={
                layers[name]: layer_ratio for name, layer_ratio in (ratios or {}).items()
            },
            ignored_layers=[layers[name] for name in whole],
            # By default pruners share these, which keeps every pruned network in memory.
            in_channel_groups={},
            out_channel_groups={},
            num_heads={},
        )
        built = time.perf_counter()
        pruner.step()
        end = time.perf_counter()
    return PeerCut(smaller, ratio, built - start, end - built)


def build_graph(model: nn.Module, image: Tensor) -> None:
    """Build Torch-Pruning's dependency graph of `model`, and nothing more."""
    import torch_pruning as tp

    with warnings.catch_warnings(action="ignore"):
        tp.DependencyGraph().build_dependency(model, example_inputs=image)


def macs(model: nn.Module, image: Tensor) -> float:
    """Return multiply-accumulates as Torch-Pruning counts them."""
    import torch_pruning as tp

    with torch.no_grad():
        count, _ = tp.utils.count_ops_and_params(model, image)
    return float(count)
