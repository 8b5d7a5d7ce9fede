"""How much the network's output changes when a residual branch is dropped.

What counts is not how far the outputs are off without the branch, but how far they stay off once
the kernels around it are re-estimated (Wang and Wu, *Practical Network Acceleration with Tiny
Sets*, CVPR 2023, call this recoverability). So each branch is dropped in turn. The kernels before
it, which take over its work, and the first one behind it are re-estimated on two thirds of a few
calibration images, and the error of the output is measured on the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.config import Budget, RefitSection
from secateur.data import Batch
from secateur.graph.dependency import DependencyGraph
from secateur.graph.interpreter import GraphInterpreter
from secateur.graph.module_state import tensors_of
from secateur.graph.residual_branches import ResidualBranch
from secateur.models.divergence import output_error
from secateur.models.task import Task
from secateur.pruning.apply import apply_plan
from secateur.pruning.equivalence import check_equivalence
from secateur.pruning.plan import PruningPlan
from secateur.pruning.refit.layerwise import RefitInputs, refit
from secateur.pruning.sensitivity import (
    FEWEST_WITH_OBJECTS,
    MOST_IMAGES,
    image_count,
)
from secateur.runtime import distributed
from secateur.runtime.device import full_float32
from secateur.runtime.progress import ProgressCallback, no_progress
from secateur.scoring.batching import first_images, images_at_a_time

FEWEST_IMAGES = 48
"""Images that are used at least, if there are so many."""
MEASURED_EVERY = 3
"""Of these images, every third is measured and the others are fitted to."""
PASSES = 2
"""Forward passes that a branch takes, about."""


@full_float32()
def measure_depth_sensitivity(
    model: nn.Module,
    dependencies: DependencyGraph,
    branches: Mapping[str, ResidualBranch],
    batches: Iterable[Batch],
    *,
    most_images: int = MOST_IMAGES,
    task: Task | None = None,
    memory_bytes: float = math.inf,
    progress: ProgressCallback = no_progress,
) -> dict[str, float]:
    """Return `{name: output error without the branch}`.

    All processes pass batches that begin with the same images. For `task` see `output_error`.
    """
    if not branches:
        return {}
    has_objects = task is not None and any(part.times is not None for part in task.parts)
    count = partial(
        image_count,
        passes=PASSES * len(branches),
        fewest=FEWEST_WITH_OBJECTS if has_objects else FEWEST_IMAGES,
        most=most_images,
    )
    images = first_images(batches, count)
    is_measured = torch.arange(len(images)) % MEASURED_EVERY == MEASURED_EVERY - 1
    if not is_measured.any():  # of one or two images
        is_measured[-1] = True
    is_fitted = ~is_measured if len(images) > 1 else is_measured
    settings = RefitSection(layers="consumers", joint=False, recalibrate_batchnorm=False)
    if memory_bytes < settings.memory_bytes:
        settings = settings.model_copy(update={"memory_mib": max(1, int(memory_bytes) >> 20)})
    expected = _outputs(model, dependencies, images[is_measured])
    errors = {}
    for name, branch in progress(branches.items(), "dropping branches", len(branches)):
        plan = _plan_without(name)
        smaller = apply_plan(model, dependencies, plan)
        inputs = RefitInputs(model, smaller, dependencies, {}, dropped=plan.dropped)
        refit(inputs, [_shard(images[is_fitted])], settings, seed=0)
        outputs = _outputs(smaller, dependencies, images[is_measured], branch)
        parts = zip(expected, outputs, strict=True)
        error = math.fsum(len(w[0]) * output_error(w, o, task) for w, o in parts)
        errors[name] = error / int(is_measured.sum())
    return errors


def droppable_branches(
    model: nn.Module,
    dependencies: DependencyGraph,
    branches: Mapping[str, ResidualBranch],
    images: Float[Tensor, "image channel *position"],
) -> dict[str, ResidualBranch]:
    """Return the branches without which the network's own forward does what is predicted."""
    smaller_sets = [tuple(branches)] if branches else []
    result: list[str] = []
    while smaller_sets:
        names = smaller_sets.pop()
        if _is_as_predicted(model, dependencies, names, images):
            result += names
        elif len(names) > 1:
            middle = len(names) // 2
            smaller_sets += [names[:middle], names[middle:]]
    return {name: branch for name, branch in branches.items() if name in result}


def _is_as_predicted(
    model: nn.Module, dependencies: DependencyGraph, names: tuple[str, ...], images: Tensor
) -> bool:
    plan = _plan_without(*names)
    try:
        smaller = apply_plan(model, dependencies, plan)
        check_equivalence(model, dependencies, plan, smaller, images)
    except Exception:  # the forward is the user's: it may raise anything
        return False
    return True


def _plan_without(*names: str) -> PruningPlan:
    return PruningPlan({}, Budget("macs", 1.0), "depth", dropped=names)


def _shard(images: Tensor) -> Batch:
    """Return this process's shard of the images, without labels."""
    numbers = torch.tensor(distributed.shard(range(len(images))), dtype=torch.int64)
    return Batch(images[numbers], torch.zeros_like(numbers), numbers)


def _outputs(
    network: nn.Module, dependencies: DependencyGraph, images: Tensor, *dropped: ResidualBranch
) -> list[list[Tensor]]:
    """Return the outputs of a network, batch by batch."""
    state = tensors_of(network)
    with torch.inference_mode():
        return [
            GraphInterpreter(dependencies.graph, state, part, dropped=dropped).finish()
            for part in images.split(images_at_a_time(*images.shape[2:]))
        ]
