"""The context that the filters of a network are scored in, and the inputs of plans."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from secateur import data
from secateur.config import ENGINE_TITLES, RunConfig
from secateur.data import DataSet, Images, split_calibration
from secateur.data.batch_reader import BatchReader
from secateur.data.imagenet import readable_class_names
from secateur.engines.latency import latency_in
from secateur.engines.registry import find_engine
from secateur.graph.build import build_dependency_graph
from secateur.graph.dependency import DependencyGraph
from secateur.graph.finite import check_finite
from secateur.graph.module_state import device_of, tensors_of
from secateur.models.evaluate import Predictions, evaluate_and_predict
from secateur.models.metrics import MetricFactory
from secateur.models.plausibility import find_doubt_about
from secateur.models.score import Score
from secateur.models.task import Task
from secateur.pipeline.inputs import make_reader, resolve_config
from secateur.pipeline.result import StageResult
from secateur.pipeline.run_context import RunContext
from secateur.pipeline.synthetic_data import STAGE, describe_extension, extend, extended_by
from secateur.pipeline.task import EXAMPLE_IMAGES, metric_of, output_parts, task_of, with_metric
from secateur.pruning.cost.batch_size import batch_that_fits
from secateur.pruning.plan_inputs import CalibrationImages, PlanInputs, make_plan_inputs
from secateur.pruning.refit.refit_and_check import RefitImages
from secateur.runtime import distributed
from secateur.runtime.memory import free_bytes
from secateur.runtime.progress import ProgressCallback, no_progress
from secateur.scoring import concepts
from secateur.scoring.concepts import ConceptSource
from secateur.scoring.criteria import Criterion, make_criterion

STATISTICS_IMAGES = 512
"""Images that batch-norm statistics are re-estimated on, at most."""


@dataclass(frozen=True, eq=False)
class ScoringContext:
    """What filters are scored on: calibration images, dependency graph and concept source."""

    calibration: Images
    example: Tensor
    """At most `EXAMPLE_IMAGES` calibration images `[image, channel, height, width]`, normalised."""
    dependencies: DependencyGraph
    source: ConceptSource
    concepts: str
    """Names of the concept sources, without `auto`."""
    reader: BatchReader
    """Reads images in batches that fit into memory, at most those of the configuration."""
    criteria: Mapping[str, Criterion]
    """Criteria by name, which the filters are scored by."""
    task: Task
    """What the network's outputs and the labels mean."""
    metric: MetricFactory | None
    """What networks are scored by; None: accuracy, or R² of values."""
    memory_bytes: int
    """What scoring may take beside feature maps."""
    notes: tuple[str, ...] = ()
    """What to tell the user of the calibration images."""

    @property
    def plan_images(self) -> CalibrationImages:
        """The calibration images as `make_plan_inputs` takes them."""
        return CalibrationImages(
            partial(self.reader.read_image_shard, self.calibration, "scoring filters"),
            partial(self.reader.read, self.calibration),
            self.example,
            self.task,
            self.memory_bytes,
        )

    def make_plan_inputs(
        self, model: nn.Module, config: RunConfig, progress: ProgressCallback = no_progress
    ) -> dict[str, PlanInputs]:
        """Score the filters of `model` by each criterion, and return what plans follow from."""
        return make_plan_inputs(
            model,
            self.dependencies,
            self.plan_images,
            self.criteria,
            self.source,
            config.score,
            config.plan,
            progress=progress,
        )

    @property
    def parts(self) -> tuple[Images, Images]:
        """The calibration images to fit to, and those held out; see `split_calibration`."""
        return split_calibration(self.calibration)

    @property
    def refit_images(self) -> RefitImages:
        """The calibration images as `refit_and_check` takes them."""
        fit, held_out = self.parts
        first = fit.take(torch.arange(min(len(fit.labels), STATISTICS_IMAGES)))
        return RefitImages(
            partial(self.reader.read_image_shard, self.calibration),
            partial(self.reader.read_shard, first, "recalibrating batch norm"),
            partial(self.reader.read_shard, held_out),
            self.task,
        )


def make_scoring_context(
    model: nn.Module,
    dataset: DataSet,
    config: RunConfig,
    run_context: RunContext | None = None,
    *,
    criterion_names: Sequence[str] = (),
    dependencies: DependencyGraph | None = None,
    original: nn.Module | None = None,
    is_extended: bool = False,
) -> ScoringContext:
    """Draw the calibration images, build the dependency graph and make the concept source.

    First the network runs on a few images, to tell how its outputs are read. Criteria that need
    gradients take more memory, so smaller batches. `dependencies` saves building the graph again.
    `original` is the network before the first cut, if `model` is not. Annotated concepts bring
    their own images, which are then the calibration set. With `is_extended` synthetic images are
    added to few ones; see `extended_by`. Raises `SecateurError`.
    """
    reader = replace(make_reader(config, run_context), device=device_of(model))
    annotated = concepts.annotated_images(config.score.concepts)
    calibration = data.draw_calibration_images(
        dataset.train if annotated is None else annotated,
        config.data.calibration_images,
        stratified=config.data.stratified and annotated is None,
        seed=config.seed,
    )
    example = reader.read_first(calibration, EXAMPLE_IMAGES)
    task = task_of(model, dataset, config, reader, example, output_parts(config, run_context))
    metric = metric_of(task, dataset, config, original or model, run_context)
    task = with_metric(task, metric)
    if dependencies is None:
        dependencies = build_dependency_graph(
            model, example, prune_residual=config.plan.prune_residual, exclude=config.plan.exclude
        )
    check_finite(model, dependencies, example)
    state = tensors_of(model)
    source_names = concepts.resolve(config.score.concepts, task, dependencies.graph)
    source = concepts.make(
        source_names,
        dependencies.graph,
        state,
        context_class_names(dataset, task, dependencies),
        reader.preprocessing,
        task,
    )
    passed = None if run_context is None else run_context.criterion
    scored_by = {
        name: make_criterion(name, source, config) if passed is None else passed
        for name in criterion_names
    }
    batch_size = batch_that_fits(
        dependencies,
        config.data.batch_size,
        min(distributed.all_gather(free_bytes(device_of(model)))),
        with_gradients=any("gradients" in criterion.needs for criterion in scored_by.values()),
    )
    reader = replace(reader, batch_size=batch_size)
    notes: tuple[str, ...] = ()
    added = extended_by(calibration, dataset.kind, original or model, config, example)
    if is_extended and added:
        notes = (describe_extension(len(calibration.labels), added),)
        calibration = extend(calibration, added, original or model, config, reader)
        if run_context is not None:
            run_context.lines.end_stage(STAGE, f"{added}")
    return ScoringContext(
        calibration,
        example,
        dependencies,
        source,
        source_names,
        reader,
        scored_by,
        task,
        metric,
        config.refit.memory_bytes,
        notes,
    )


def context_class_names(
    dataset: DataSet, task: Task, dependencies: DependencyGraph
) -> tuple[str, ...]:
    """Return the names of the classes as the concepts and the report show them."""
    if task.kind != "single-label":
        return dataset.class_names
    return readable_class_names(dataset.class_names, task.concept_count(dependencies.graph.output))


@dataclass(frozen=True, eq=False)
class Baseline:
    """A network before a cut: runs with other criteria and budgets share it."""

    score: Score
    """On the test images."""
    predictions: Predictions | None
    """What the network predicts of them; None where they were not scored again."""
    notes: tuple[str, ...]
    """What to tell the user of the data, of the outputs and of that score."""
    context: ScoringContext
    plan_inputs: Mapping[str, PlanInputs]
    """By criterion."""
    seconds: float
    """Time of all but the score."""
    unreadable: tuple[str, ...] = ()
    """Image files that were left out."""


def make_baseline(
    model: nn.Module,
    dataset: DataSet,
    config: RunConfig,
    criterion_names: Sequence[str] = (),
    run_context: RunContext | None = None,
    *,
    score: Score | None = None,
    original: nn.Module | None = None,
) -> Baseline:
    """Score the filters of `model`, by the named criteria or else by that of `config`.

    Before that `model` is scored on the test images, if its `score` is not known. `original` is the
    network before the first cut, if `model` is not. Raises
    `AccuracyError` if it is not worth pruning, unless `config` allows that.
    """
    run_context = (run_context or RunContext()).collecting_unreadable(config)
    config = resolve_config(config, dataset, model)
    names = criterion_names or (config.score.criterion,)
    since = time.perf_counter()
    context = make_scoring_context(
        model,
        dataset,
        config,
        run_context,
        criterion_names=names,
        original=original,
        is_extended=True,
    )
    seconds = time.perf_counter() - since
    predictions: Predictions | None = None
    notes = (*dataset.notes, *context.task.notes, *context.notes)
    if score is None:
        doubts: list[str] = []

        def check(predictions: Predictions) -> None:
            doubt = find_doubt_about(predictions, context.task, has_labels=dataset.has_labels)
            if doubt is not None:
                doubt.raise_unless(allowed=config.model.allow_untrained)
                doubts.append(doubt.note("before pruning, "))

        score, predictions = evaluate_and_predict(
            model,
            context.reader.read_shard(dataset.test, "scoring (before)"),
            task=context.task,
            metric=context.metric,
            known_ms=0.0,
            check=check,
        )
        engine = find_engine(config.plan.engine)
        milliseconds, batch = distributed.on_main_process(
            lambda: latency_in(engine, model, context.example)
        )
        score = replace(score, latency_ms=milliseconds, latency_batch=batch)
        notes = (*notes, *doubts)
        before = StageResult(stage="before", round=1, score=score, seconds=0.0)
        run_context.end_stage(before, context.task)
    since = time.perf_counter()
    plan_inputs = context.make_plan_inputs(model, config, run_context.progress)
    multiples = plan_inputs[names[0]].engine_multiples
    if multiples is not None:
        notes = (*notes, f"in {ENGINE_TITLES[config.plan.engine]}, {multiples}")
    seconds += time.perf_counter() - since
    return Baseline(
        score, predictions, notes, context, plan_inputs, seconds, run_context.unreadable_files
    )
