"""What the stages of a round work on: the first round's network, or what the last one has left."""

from __future__ import annotations

import time
from dataclasses import dataclass

from torch import nn

from secateur.config import RunConfig
from secateur.data import DataSet
from secateur.pipeline.inputs import limit_batch_size
from secateur.pipeline.pruned import Pruned
from secateur.pipeline.result import StageResult
from secateur.pipeline.run_context import RunContext
from secateur.pipeline.scoring_context import (
    Baseline,
    ScoringContext,
    collect_plan_inputs,
    make_baseline,
    make_scoring_context,
)
from secateur.pruning.plan_inputs import PlanInputs


@dataclass(frozen=True, eq=False)
class Round:
    """What the stages of one round share."""

    number: int
    """From 1."""
    original: nn.Module
    """The network before the first cut: the teacher."""
    network: nn.Module
    """What this round cuts: the network that the round before has left."""
    dataset: DataSet
    config: RunConfig
    """Resolved, with a batch size that fits into memory."""
    requested_batch_size: int | None
    """The batch size that was asked for, where it does not fit."""
    context: ScoringContext
    """Of `network`."""
    plan_inputs: PlanInputs
    seconds: float
    """Time that the context and the plan inputs took."""
    stages: tuple[StageResult, ...]
    """Of the earlier rounds; the first is the original network's."""
    unreadable: tuple[str, ...]
    """Image files that were left out before."""
    run_context: RunContext


def first_round(
    original: nn.Module,
    dataset: DataSet,
    config: RunConfig,
    run_context: RunContext,
    baseline: Baseline | None,
) -> Round:
    """Return the round that cuts the original network, of which a baseline may be known."""
    baseline = baseline or make_baseline(original, dataset, config, run_context=run_context)
    context = baseline.context.reporting_to(run_context)
    before = StageResult(stage="before", round=1, score=baseline.score, seconds=0.0)
    is_limited = context.reader.batch_size < config.data.batch_size
    if is_limited:
        _log_batch_size(run_context, config, context)
    run_context.log.write("stage", **before.model_dump())
    return Round(
        number=1,
        original=original,
        network=original,
        dataset=dataset,
        config=limit_batch_size(config, context.reader.batch_size),
        requested_batch_size=config.data.batch_size if is_limited else None,
        context=context,
        plan_inputs=baseline.plan_inputs[config.score.criterion],
        seconds=baseline.seconds,
        stages=(before,),
        unreadable=baseline.unreadable,
        run_context=run_context,
    )


def next_round(
    original: nn.Module,
    dataset: DataSet,
    config: RunConfig,
    run_context: RunContext,
    earlier: Pruned,
) -> Round:
    """Return the round that cuts what the earlier ones have left."""
    since = time.perf_counter()
    criterion = config.score.criterion
    context = make_scoring_context(
        earlier.model, dataset, config, run_context, criterion_names=(criterion,)
    )
    plan_inputs = collect_plan_inputs(earlier.model, context, config)[criterion]
    seconds = time.perf_counter() - since
    is_limited = context.reader.batch_size < config.data.batch_size
    requested = earlier.result.requested_batch_size
    if is_limited:
        _log_batch_size(run_context, config, context)
        requested = config.data.batch_size
    return Round(
        number=earlier.round + 1,
        original=original,
        network=earlier.model,
        dataset=dataset,
        config=limit_batch_size(config, context.reader.batch_size),
        requested_batch_size=requested,
        context=context,
        plan_inputs=plan_inputs,
        seconds=seconds,
        stages=earlier.result.stages,
        unreadable=earlier.result.unreadable,
        run_context=run_context,
    )


def _log_batch_size(run_context: RunContext, config: RunConfig, context: ScoringContext) -> None:
    run_context.log.write(
        "batch_size", requested=config.data.batch_size, used=context.reader.batch_size
    )
