"""Repairs a network that was cut, in closed form, and keeps the better of before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from secateur.config import RefitSection
from secateur.data import Batch
from secateur.evaluation.divergence import divergence_by_image, is_smaller, logits_of
from secateur.graph.dependency import DependencyGraph
from secateur.pruning.plan import PruningPlan
from secateur.pruning.refit.batchnorm import BatchNormRecalibration, recalibrate_batchnorm
from secateur.pruning.refit.layerwise import LayerRefit, refit
from secateur.runtime.progress import ProgressCallback, no_progress

Batches = Callable[[], Iterable[Batch]]


@dataclass(frozen=True)
class RefitCheck:
    """Whether re-estimated kernels are better than those of the cut, on held-out calibration
    images.

    Divergences are mean KL divergences from the original network's answers, in nats.
    """

    divergence_cut: float
    divergence_refit: float
    is_kept: bool
    """Whether the re-estimated kernels stayed; else the network was left as it was cut."""


@dataclass(frozen=True)
class RefitOutcome:
    """What was done to a network that had been cut."""

    layers: tuple[LayerRefit, ...] = ()
    check: RefitCheck | None = None
    batchnorm: BatchNormRecalibration | None = None


def refit_and_check(
    model: nn.Module,
    smaller: nn.Module,
    dependencies: DependencyGraph,
    plan: PruningPlan,
    settings: RefitSection,
    calibration: Batches,
    fit: Batches,
    held_out: Batches,
    *,
    seed: int,
    progress: ProgressCallback = no_progress,
) -> RefitOutcome:
    """Re-estimates the kernels of `smaller`, the cut `model`, in place, then norm statistics.

    Kernels that make the answers on `held_out` diverge more from the original's than those of the
    cut did, and by more than chance explains, are taken back. `probe` gives the calibration images,
    or this process's share of them; `fit` and `held_out` their two parts. No label is looked at.
    """
    layers: tuple[LayerRefit, ...] = ()
    check: RefitCheck | None = None
    expected = logits_of(model, held_out())
    if settings.layers != "none":
        before = {name: tensor.clone() for name, tensor in smaller.state_dict().items()}
        cut = divergence_by_image(expected, logits_of(smaller, held_out()))
        layers = refit(
            model,
            smaller,
            dependencies,
            plan,
            calibration(),
            settings,
            seed=seed,
            progress=progress,
        )
        found = divergence_by_image(expected, logits_of(smaller, held_out()))
        is_kept = bool(torch.isfinite(found).all()) and not is_smaller(found, cut)
        check = RefitCheck(float(cut.mean()), float(found.mean()), is_kept)
        if not is_kept:
            smaller.load_state_dict(before)
    norms = (
        recalibrate_batchnorm(expected, smaller, fit, held_out)
        if settings.recalibrate_batchnorm
        else None
    )
    return RefitOutcome(layers, check, norms)
