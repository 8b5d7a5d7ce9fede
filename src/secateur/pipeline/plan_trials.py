"""Try several plans for one budget: cut and refit by each, and keep the best.

The sensitivity of a layer is measured in a network of which nothing else is cut, and without the
refit that follows. How much of an error the layers behind can correct depends on the network. So
the further plans weigh layers by depth: they take more of the first layers, whose errors the most
layers behind can correct.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from secateur.config import Budget, RefitSection
from secateur.models.divergence import divergence_from, outputs_of
from secateur.pipeline.scoring_context import ScoringContext
from secateur.pruning.apply import apply_plan
from secateur.pruning.outcome import PlanTrial
from secateur.pruning.plan import PruningPlan
from secateur.pruning.plan_inputs import PlanInputs
from secateur.pruning.refit.layerwise import RefitInputs
from secateur.pruning.refit.refit_and_check import refit_and_check
from secateur.runtime.progress import ProgressCallback, no_progress

DEPTH_WEIGHTS = (0.0, 1.0, 0.5, 2.0)
"""Weights of depth (`PlanInputs.plan`), in the order in which they are tried."""
TRIAL_IMAGES = 500
"""Calibration images that a trial takes, at most."""


def best_plan(
    network: nn.Module,
    plan_inputs: PlanInputs,
    budget: Budget,
    context: ScoringContext,
    settings: RefitSection,
    *,
    seed: int,
    progress: ProgressCallback = no_progress,
) -> tuple[PruningPlan, tuple[PlanTrial, ...]]:
    """Return the plan of `plan_inputs.settings.trials` that diverges least, and what each came to.

    Each is cut and refitted by `settings` without the joint estimate. The divergence is that of the
    outputs from those of `network`, on the held-out images of the calibration set. Plans that are
    the same are tried once; a single one is not tried.
    """
    plans: dict[str, tuple[float, PruningPlan]] = {}
    for weight in DEPTH_WEIGHTS[: plan_inputs.settings.trials]:
        plan = plan_inputs.plan(budget, weight)
        plans.setdefault(plan.hash, (weight, plan))
    if len(plans) == 1:
        return plan, ()
    count = min(TRIAL_IMAGES, len(context.calibration.labels))
    part = replace(context, calibration=context.calibration.take(torch.arange(count)))
    images = part.refit_images
    expected = outputs_of(network, images.held_out(), images.task)
    settings = settings.model_copy(update={"joint": False, "recalibrate_batchnorm": False})
    trials: list[tuple[PlanTrial, PruningPlan]] = []
    for weight, plan in plans.values():
        smaller = apply_plan(network, context.dependencies, plan)
        if settings.is_any:
            inputs = RefitInputs(
                network, smaller, context.dependencies, plan.removed, plan.ranks, plan.dropped
            )
            refit_and_check(inputs, images, settings, seed=seed, progress=progress)
        error = divergence_from(expected, smaller, images.held_out(), task=images.task)
        trials.append((PlanTrial(weight, error.divergence), plan))
    _, best = min(trials, key=lambda trial: trial[0].divergence)
    return best, tuple(trial for trial, _ in trials)
