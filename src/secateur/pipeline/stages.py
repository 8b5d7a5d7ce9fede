"""The stages of a round: cut, refit, distill, finetune. Each returns its outcome.

Every stage ends with a score on the test images, which nothing else reads.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from secateur.config import Budget
from secateur.data import Batch, DataSet
from secateur.data.batch_reader import BatchReader
from secateur.engines.registry import find_engine
from secateur.graph.module_state import copy_of
from secateur.models.evaluate import Predictions, evaluate, evaluate_and_predict
from secateur.models.metrics import MetricFactory
from secateur.models.score import Score
from secateur.models.state_dict import load_state
from secateur.models.task import Task
from secateur.pipeline.inputs import make_reader
from secateur.pipeline.plan_trials import best_plan
from secateur.pipeline.pruned import Pruned
from secateur.pipeline.result import FinetuneResult, KeptWeights, StageResult
from secateur.pipeline.rounds import Round
from secateur.pipeline.run_context import RunContext
from secateur.pipeline.task import metric_of, validation_metric_of
from secateur.pruning.apply import apply_plan, dropped_branches
from secateur.pruning.cost.latency_profiler import Stopwatch
from secateur.pruning.equivalence import check_equivalence
from secateur.pruning.outcome import RefitOutcome, SizeTrial
from secateur.pruning.plan import PruningPlan
from secateur.pruning.refit.layerwise import RefitInputs
from secateur.pruning.refit.refit_and_check import refit_and_check
from secateur.pruning.size_search import bisect, plan_in_time, smallest_kept
from secateur.training import distill as distillation
from secateur.training.checkpoint import Checkpoints
from secateur.training.feature_distillation import residual_sums
from secateur.training.outcome import Distillation, has_collapsed
from secateur.training.own_loss import find_loss
from secateur.training.trainer import TrainingCallbacks, train
from secateur.training.training_data import TrainingData

SCORING = "scoring (finetuned)"


@dataclass(frozen=True, eq=False)
class CutStage:
    """The smaller network, and how its plan was found."""

    network: nn.Module
    plan: PruningPlan
    size_trials: tuple[SizeTrial, ...]
    equivalence_error: float
    result: StageResult


@dataclass(frozen=True, eq=False)
class RefitStage:
    """What re-estimating kernels and batch-norm statistics came to."""

    outcome: RefitOutcome
    result: StageResult


@dataclass(frozen=True, eq=False)
class DistillStage:
    """What distillation on the calibration images came to."""

    distillation: Distillation
    result: StageResult


@dataclass(frozen=True, eq=False)
class FinetuneStage:
    """What fine-tuning came to."""

    finetuning: FinetuneResult
    result: StageResult


def cut(this: Round) -> CutStage:
    """Remove the filters of a plan from a copy of the round's network, and check the result."""
    since = time.perf_counter() - this.seconds
    dependencies, example = this.context.dependencies, this.context.example
    plan, size_trials = _make_plan(this)
    smaller = apply_plan(this.network, dependencies, plan)
    error = check_equivalence(this.network, dependencies, plan, smaller, example)
    seconds = time.perf_counter() - since
    # Of all stages of this round: neither refit nor training change what a forward pass computes.
    before = this.stages[0].score
    stopwatch = Stopwatch(
        this.original,
        example,
        find_engine(this.config.plan.engine),
        size=before.latency_batch,
        is_only_shown=True,
    )
    fraction_left = stopwatch.fraction_left(smaller)
    batches = this.context.reader.read_shard(this.dataset.test, "scoring (cut)")
    score = evaluate(
        smaller,
        batches,
        task=this.context.task,
        metric=this.context.metric,
        original=this.predictions,
        known_ms=fraction_left * before.latency_ms,
        latency_batch=before.latency_batch,
    )
    result = StageResult(stage="cut", round=this.number, score=score, seconds=seconds)
    this.run_context.end_stage(result, this.context.task)
    return CutStage(smaller, plan, size_trials, error, result)


def refit(this: Round, cut_stage: CutStage) -> RefitStage:
    """Re-estimate kernels and batch-norm statistics of the cut network in place."""
    since = time.perf_counter()
    outcome = refit_and_check(
        RefitInputs(
            this.network,
            cut_stage.network,
            this.context.dependencies,
            cut_stage.plan.removed,
            cut_stage.plan.ranks,
            cut_stage.plan.dropped,
        ),
        this.context.refit_images,
        this.config.refit,
        seed=this.config.seed,
        progress=this.run_context.progress,
    )
    seconds = time.perf_counter() - since
    batches = this.context.reader.read_shard(this.dataset.test, "scoring (refit)")
    before = cut_stage.result.score
    score = evaluate(
        cut_stage.network,
        batches,
        task=this.context.task,
        metric=this.context.metric,
        original=this.predictions,
        known_ms=before.latency_ms,
        latency_batch=before.latency_batch,
    )
    result = StageResult(stage="refit", round=this.number, score=score, seconds=seconds)
    this.run_context.end_stage(result, this.context.task)
    return RefitStage(outcome, result)


def distill(this: Round, cut_stage: CutStage) -> DistillStage:
    """Train the cut network in place towards the original's outputs, without labels."""
    since = time.perf_counter()
    smaller, reader = cut_stage.network, this.context.reader
    fit, held_out = this.context.parts
    is_cut_once = this.network is this.original  # later cuts count channels anew
    dependencies, plan = this.context.dependencies, cut_stage.plan
    branches = dropped_branches(this.network, dependencies, plan)
    sums = residual_sums(dependencies, plan.removed, branches) if is_cut_once else ()
    outcome = distillation.distill(
        this.original,
        smaller,
        TrainingData(fit, reader.preprocessing, reader.unreadable, this.context.task),
        partial(reader.read_shard, held_out),
        this.config.distill,
        seed=this.config.seed,
        sums=sums,
        callbacks=TrainingCallbacks(reader.progress, lines=this.run_context.lines),
    )
    for epoch in outcome.epochs:
        this.run_context.log.write("distill", **asdict(epoch))
    seconds = time.perf_counter() - since
    batches = reader.read_shard(this.dataset.test, "scoring (distilled)")
    score = evaluate(
        smaller,
        batches,
        task=this.context.task,
        metric=this.context.metric,
        original=this.predictions,
        known_ms=cut_stage.result.score.latency_ms,
        latency_batch=cut_stage.result.score.latency_batch,
    )
    result = StageResult(stage="distilled", round=this.number, score=score, seconds=seconds)
    this.run_context.end_stage(result, this.context.task)
    return DistillStage(outcome, result)


def finetune(
    pruned: Pruned,
    original: nn.Module,
    dataset: DataSet,
    run_context: RunContext,
    checkpoints: Path | None = None,
) -> FinetuneStage:
    """Train `pruned.model` in place as its configuration says, with `original` as its teacher.

    The last epoch's weights stay, or those of the epoch that was best on the validation images;
    both are scored on the test images. If training has broken the network (see `has_collapsed`)
    the weights from before it stay.
    """
    config, smaller, task = pruned.result.config, pruned.model, pruned.result.task
    reader = make_reader(config, run_context)
    assert pruned.predictions is not None
    start = {name: tensor.clone() for name, tensor in smaller.state_dict().items()}
    start_score = pruned.result.stages[-1].score
    expected = _expected_outputs(original, dataset, reader, task)
    metric = metric_of(task, dataset, config, original, run_context)
    validation_metric = validation_metric_of(task, dataset, config, original, run_context)
    own_loss = find_loss(config.finetune.loss, run_context.loss)

    def validate(network: nn.Module) -> float:
        batches = reader.read_shard(dataset.validation, "validating")
        return evaluate(
            network, batches, task=task, metric=validation_metric, original=expected, known_ms=0.0
        ).metric

    has_features = config.finetune.feature_weight > 0
    branches = dropped_branches(original, pruned.dependencies, pruned.plan)
    training = train(
        smaller,
        original,
        TrainingData(dataset.train, reader.preprocessing, reader.unreadable, task, own_loss),
        config.finetune,
        seed=config.seed,
        sums=residual_sums(pruned.dependencies, pruned.plan.removed, branches)
        if has_features
        else (),
        callbacks=TrainingCallbacks(
            run_context.progress,
            validate,
            lambda epoch: run_context.log.write("epoch", round=pruned.round, **asdict(epoch)),
            run_context.lines,
            task.describe,
        ),
        checkpoints=None if checkpoints is None else Checkpoints(checkpoints),
    )
    assert training.before is not None
    last, best = (
        _score_weights(pruned, weights, reader.read_shard(dataset.test, SCORING), metric)
        for weights in (training.last, training.best)
    )
    kept: KeptWeights = config.finetune.keep
    if kept == "last" and has_collapsed(training.before, training.epochs):
        kept = "start"
        load_state(smaller, start)
    finetuning = FinetuneResult(
        epochs=training.epochs,
        before_metric=training.before,
        best_epoch=training.best_epoch,
        ended=training.ended,
        last=last,
        best=best,
        kept=kept,
    )
    result = StageResult(
        stage="finetuned",
        round=pruned.round,
        score={"last": last, "best": best, "start": start_score}[kept],
        seconds=training.seconds,
    )
    run_context.end_stage(result, task)
    return FinetuneStage(finetuning, result)


def _score_weights(
    pruned: Pruned,
    weights: Mapping[str, Tensor],
    batches: Iterable[Batch],
    metric: MetricFactory | None,
) -> Score:
    """Return the score of the pruned network with other weights."""
    network = copy_of(pruned.model, share_tensors=False)
    load_state(network, weights)
    return evaluate(
        network,
        batches,
        task=pruned.result.task,
        metric=metric,
        original=pruned.predictions,
        known_ms=pruned.result.stages[-1].score.latency_ms,
        latency_batch=pruned.result.stages[-1].score.latency_batch,
    )


def _expected_outputs(
    original: nn.Module, dataset: DataSet, reader: BatchReader, task: Task
) -> Predictions | None:
    """Return what to compare outputs for the validation images with; None: their labels."""
    if task.has_labels:
        return None
    batches = reader.read_shard(dataset.validation)
    _, predictions = evaluate_and_predict(original, batches, task=task, known_ms=0.0)
    return predictions


def _make_plan(this: Round) -> tuple[PruningPlan, tuple[SizeTrial, ...]]:
    """Return the plan for this round's part of the budget, or for the size that was found."""
    plan_inputs, settings, budget = this.plan_inputs, this.config.plan, this.config.plan.budget
    fraction_left = budget.fraction_left ** (1 / settings.rounds)  # the same every round
    if settings.max_drop is None and (budget.quantity != "latency" or fraction_left == 1):
        plan, plan_trials = best_plan(
            this.network,
            plan_inputs,
            replace(budget, fraction_left=fraction_left),
            this.context,
            this.config.refit,
            seed=this.config.seed,
            progress=this.run_context.progress,
        )
        for trial in plan_trials:
            this.run_context.log.write("plan_trial", **asdict(trial))
        return plan, ()
    if settings.max_drop is not None:
        size_trials = _search_size(this, budget, settings.max_drop)
        return plan_inputs.plan(
            replace(budget, fraction_left=smallest_kept(size_trials))
        ), size_trials
    budget = replace(budget, fraction_left=fraction_left)
    plan, measured_fraction = plan_in_time(
        this.network,
        this.context.dependencies,
        lambda fraction: plan_inputs.plan(Budget(budget.quantity, fraction)),
        fraction_left,
        plan_inputs.least(budget),
        Stopwatch(this.network, this.context.example, find_engine(settings.engine)),
    )
    this.run_context.log.write("latency_left", fraction=measured_fraction)
    return replace(plan, budget=budget), ()


def _search_size(this: Round, budget: Budget, max_drop: float) -> tuple[SizeTrial, ...]:
    """Cut and refit networks of several sizes, and measure them on the validation images.

    `max_drop` is how much of the metric may be lost: percentage points, or its own unit.
    """
    least = this.plan_inputs.least(budget)

    def attempt(fraction_left: float) -> float:
        plan = this.plan_inputs.plan(replace(budget, fraction_left=fraction_left))
        smaller = apply_plan(this.network, this.context.dependencies, plan)
        if this.config.refit.is_any:
            refit_and_check(
                RefitInputs(
                    this.network,
                    smaller,
                    this.context.dependencies,
                    plan.removed,
                    plan.ranks,
                    plan.dropped,
                ),
                this.context.refit_images,
                this.config.refit,
                seed=this.config.seed,
                progress=this.run_context.progress,
            )
        after = validate(smaller)
        this.run_context.log.write(
            "size_trial", fraction_left=fraction_left, validation_metric=after
        )
        return after

    reader, task = this.context.reader, this.context.task
    expected = _expected_outputs(this.network, this.dataset, reader, task)
    metric = validation_metric_of(task, this.dataset, this.config, this.network, this.run_context)

    def validate(network: nn.Module) -> float:
        batches = reader.read_shard(this.dataset.validation)
        return evaluate(
            network,
            batches,
            task=task,
            metric=metric,
            original=expected,
            known_ms=0.0,
        ).metric

    before = validate(this.network)
    limit = before - (max_drop / 100 if task.metric_unit == "%" else max_drop)
    trials = bisect(attempt, limit, least)
    return (SizeTrial(1.0, before, kept=True), *trials)
