"""Refit a cut network in closed form, and keep the better of before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.config import RefitSection
from secateur.data import Batch
from secateur.models.divergence import DivergenceFrom, outputs_of
from secateur.models.state_dict import load_state
from secateur.models.task import SINGLE_LABEL, Task
from secateur.pruning.outcome import LayerRefit, RefitCheck, RefitOutcome
from secateur.pruning.refit.batchnorm import recalibrate_batchnorm
from secateur.pruning.refit.layerwise import RefitInputs, refit
from secateur.pruning.refit.significance import is_smaller
from secateur.runtime.device import full_float32
from secateur.runtime.kept_memory import give_memory_back
from secateur.runtime.progress import ProgressCallback, no_progress


@dataclass(frozen=True, eq=False)
class RefitImages:
    """The calibration images, all of them and in two parts; each yields this process's shard."""

    calibration: Callable[[], Iterable[Batch]]
    fit: Callable[[], Iterable[Batch]]
    held_out: Callable[[], Iterable[Batch]]
    task: Task = SINGLE_LABEL
    """How the network's outputs on them are read."""


@full_float32()
def refit_and_check(
    inputs: RefitInputs,
    images: RefitImages,
    settings: RefitSection,
    *,
    seed: int,
    progress: ProgressCallback = no_progress,
) -> RefitOutcome:
    """Refit the kernels of `inputs.smaller` in place, then recalibrate its batch norms.

    The refitted kernels are discarded if they make the outputs on the held-out images diverge more
    from the original's than those of the cut did, by more than chance explains. No label is used.
    """
    smaller = inputs.smaller
    layers: tuple[LayerRefit, ...] = ()
    check: RefitCheck | None = None
    expected = outputs_of(inputs.model, images.held_out(), images.task)
    divergence = DivergenceFrom(expected, images.held_out, images.task)
    current: Tensor | None = None
    if settings.layers != "none":
        before = {name: tensor.clone() for name, tensor in smaller.state_dict().items()}
        cut = divergence(smaller)
        give_memory_back()
        layers = refit(
            inputs,
            images.calibration(),
            settings,
            seed=seed,
            task=images.task,
            progress=progress,
        )
        give_memory_back()
        refitted = divergence(smaller)
        is_kept = bool(torch.isfinite(refitted).all()) and not is_smaller(refitted, cut)
        check = RefitCheck(float(cut.mean()), float(refitted.mean()), is_kept)
        current = refitted if is_kept else cut
        if not is_kept:
            load_state(smaller, before)
    batchnorm = (
        recalibrate_batchnorm(smaller, images.fit, divergence, current)
        if settings.recalibrate_batchnorm
        else None
    )
    return RefitOutcome(layers, check, batchnorm)
