"""A round: scored filters, a plan, and the stages that carry it out."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from secateur.config import RunConfig
from secateur.data import DataSet
from secateur.graph.module_state import tensors_of
from secateur.models.evaluate import Predictions
from secateur.pipeline.pruned import Pruned
from secateur.pipeline.result import StageResult
from secateur.pipeline.run_context import RunContext
from secateur.pipeline.scoring_context import Baseline, ScoringContext, make_baseline
from secateur.pruning.plan_inputs import PlanInputs
from secateur.runtime.hashing import weights_hash


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
    """The batch size that was requested, if it does not fit."""
    context: ScoringContext
    """Of `network`."""
    plan_inputs: PlanInputs
    seconds: float
    """Time that the context and the plan inputs took."""
    stages: tuple[StageResult, ...]
    """Of the earlier rounds; the first is the original network's."""
    weights: str | None
    """Hash of the original network's weights; None after the first round."""
    unreadable: tuple[str, ...]
    """Image files that were left out before."""
    predictions: Predictions
    """What the original network predicts of the test images."""
    notes: tuple[str, ...]
    """See `Baseline`; of the first round."""
    run_context: RunContext


def begin_round(
    original: nn.Module,
    dataset: DataSet,
    config: RunConfig,
    run_context: RunContext,
    *,
    baseline: Baseline | None = None,
    earlier: Pruned | None = None,
) -> Round:
    """Prepare to cut `original`, or the network that the earlier rounds made of it."""
    network = original if earlier is None else earlier.model
    if baseline is None:
        score = None if earlier is None else earlier.result.stages[-1].score
        baseline = make_baseline(
            network, dataset, config, (), run_context, score=score, original=original
        )
    elif earlier is None:  # which another run may have logged
        before = StageResult(stage="before", round=1, score=baseline.score, seconds=0.0)
        run_context.log.write("stage", **before.model_dump())
    reader = baseline.context.reader
    predictions = baseline.predictions if earlier is None else earlier.predictions
    assert predictions is not None
    weights: str | None = None
    if earlier is None:
        state = tensors_of(original)
        weights = weights_hash(state)
    requested = None if earlier is None else earlier.result.requested_batch_size
    if reader.batch_size < config.data.batch_size:
        requested = config.data.batch_size
        run_context.log.write("batch_size", requested=requested, used=reader.batch_size)
        data_section = config.data.model_copy(update={"batch_size": reader.batch_size})
        config = config.model_copy(update={"data": data_section})
    stages: tuple[StageResult, ...]
    if earlier is None:
        before = StageResult(stage="before", round=1, score=baseline.score, seconds=0.0)
        number, stages, unreadable = 1, (before,), baseline.unreadable
    else:
        number, stages = earlier.round + 1, earlier.result.stages
        unreadable = (*earlier.result.unreadable, *baseline.unreadable)
    notes = baseline.notes if earlier is None else earlier.result.notes
    plan_inputs = baseline.plan_inputs[config.score.criterion]
    if plan_inputs.latency is not None:
        run_context.log.write("latency", **plan_inputs.latency.model_dump(exclude={"layers"}))
    reader = replace(reader, progress=run_context.progress, unreadable=run_context.unreadable)
    return Round(
        number=number,
        original=original,
        network=network,
        dataset=dataset,
        config=config,
        requested_batch_size=requested,
        context=replace(baseline.context, reader=reader),
        plan_inputs=plan_inputs,
        seconds=baseline.seconds,
        stages=stages,
        weights=weights,
        unreadable=unreadable,
        predictions=predictions,
        notes=notes,
        run_context=run_context,
    )
