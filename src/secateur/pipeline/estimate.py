"""Estimate how long the stages of a run will take on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from torch import nn

from secateur.config import RunConfig
from secateur.data import DataSet
from secateur.graph.output_values import OutputPart
from secateur.models.examine import run_network
from secateur.pipeline.inputs import make_reader
from secateur.pipeline.result import stage_title
from secateur.pipeline.run_context import RunContext
from secateur.pipeline.task import EXAMPLE_IMAGES, output_parts, task_of

REPORT_STAGE = "report"
LATENCY_PASSES = 500
"""Forward passes of one image that the latencies before and after the cut take."""
SENSITIVITY_PASSES = 80
"""Forward passes of one image that the sensitivity of one layer takes."""
SCORING_PASSES, REFIT_PASSES, GALLERY_PASSES = 3, 6, 8
"""Forward passes of each calibration image that these stages take."""
TRAINING_PASSES = 4
"""Forward passes that one training image takes: forward, backward, and the teacher's forward."""


def estimate_stages(
    model: nn.Module, dataset: DataSet, config: RunConfig, parts: Sequence[OutputPart] = ()
) -> dict[str, float]:
    """Return the estimated seconds of each stage that `config` asks for, by title, in order.

    The estimate is rough: forward passes that each stage takes, times what one takes here. `parts`
    are those of `task_of`, whose errors it raises.
    """
    passes: dict[str, float] = {}
    calibration = min(config.data.calibration_images, len(dataset.train.labels))
    test, train = len(dataset.test.labels), len(dataset.train.labels)
    layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules())
    sensitivity = layers * SENSITIVITY_PASSES * (config.plan.allocation == "sensitivity")
    passes[stage_title("before", 1)] = test
    for number in range(1, config.plan.rounds + 1):
        scoring = calibration * SCORING_PASSES + sensitivity + LATENCY_PASSES + test
        passes[stage_title("cut", number)] = scoring
        if config.refit.is_any:
            passes[stage_title("refit", number)] = calibration * REFIT_PASSES + test
        if config.distill.epochs:
            epochs = config.distill.epochs
            passes[stage_title("distilled", number)] = calibration * TRAINING_PASSES * epochs + test
        if config.finetune.epochs:
            steps = train * TRAINING_PASSES + len(dataset.validation.labels)
            passes[stage_title("finetuned", number)] = steps * config.finetune.epochs + 2 * test
    if config.report.images:
        passes[REPORT_STAGE] = min(config.report.images, calibration) * GALLERY_PASSES
    seconds = _seconds_per_image(model, dataset, config, parts)
    return {title: seconds * count for title, count in passes.items()}


def show_plan(
    run_context: RunContext,
    model: nn.Module,
    dataset: DataSet,
    config: RunConfig,
    is_ahead: Callable[[str], bool] = lambda title: True,
) -> None:
    """Print the stages whose titles are ahead, with their estimate, if anybody sees it."""
    if run_context.lines.is_shown:
        parts = output_parts(config, run_context)
        estimates = estimate_stages(model, dataset, config, parts)
        run_context.lines.plan({title: estimates[title] for title in estimates if is_ahead(title)})


def _seconds_per_image(
    model: nn.Module, dataset: DataSet, config: RunConfig, parts: Sequence[OutputPart]
) -> float:
    """Time one forward pass of a few images, after one to warm up."""
    reader = make_reader(config, RunContext().collecting_unreadable(config))
    example = reader.read_first(dataset.train, EXAMPLE_IMAGES)
    task_of(model, dataset, config, reader, example, parts)  # raises before anything is shown
    since = time.perf_counter()
    run_network(model, example)
    return (time.perf_counter() - since) / len(example)
