"""The method, from top to bottom: score, plan, cut, refit, distill, fine-tune, in rounds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from secateur.config import RunConfig
from secateur.data import DataSet
from secateur.engines.registry import find_engine
from secateur.graph.dependency import DependencyGraph
from secateur.graph.factorisation import form_of, shapes_of_factors
from secateur.graph.module_state import device_of
from secateur.graph.residual_branches import ResidualBranch
from secateur.models.reparameterize import hint as branches_hint
from secateur.pipeline import stages
from secateur.pipeline.estimate import REPORT_STAGE, show_plan
from secateur.pipeline.inputs import describe_inputs, resolve_config
from secateur.pipeline.pruned import Pruned
from secateur.pipeline.result import (
    DroppedResult,
    FrozenResult,
    GroupResult,
    RunResult,
    SplitResult,
    merge_rounds,
)
from secateur.pipeline.rounds import Round, begin_round
from secateur.pipeline.run_context import RunContext
from secateur.pipeline.scoring_context import Baseline
from secateur.pipeline.stages import CutStage, DistillStage, RefitStage
from secateur.pruning.apply import dropped_branches
from secateur.pruning.cost.dropped import dropped_savings
from secateur.pruning.outcome import RefitOutcome
from secateur.runtime.environment import environment
from secateur.runtime.errors import TargetError


def prune(
    model: nn.Module,
    dataset: DataSet,
    config: RunConfig,
    *,
    baseline: Baseline | None = None,
    run_context: RunContext | None = None,
    checkpoints: Path | None = None,
) -> Pruned:
    """Return a smaller copy of `model`, fine-tuned if `config` says so.

    `config.model` only names the network; `model` is what is pruned, and it is not changed.
    `baseline` is what is known of it already. Fine-tuning resumes from the folder `checkpoints`,
    if one is given. The test images are scored, and used for nothing else. Raises `SecateurError`.
    """
    run_context = run_context or RunContext()
    show_plan(run_context, model, dataset, config, lambda title: title != REPORT_STAGE)
    pruned = prune_round(model, dataset, config, run_context, baseline=baseline)
    while not pruned.is_finished:
        folder = None if checkpoints is None else checkpoints / f"round-{pruned.round}"
        pruned = take_next_step(pruned, model, dataset, run_context, folder)
    return pruned


def take_next_step(
    pruned: Pruned,
    original: nn.Module,
    dataset: DataSet,
    run_context: RunContext,
    checkpoints: Path | None = None,
) -> Pruned:
    """Fine-tune the network after its last cut; if that is done, prune another round."""
    if pruned.is_finetuned:
        return prune_round(original, dataset, pruned.result.config, run_context, earlier=pruned)
    return finetune(pruned, original, dataset, run_context, checkpoints)


def prune_round(
    original: nn.Module,
    dataset: DataSet,
    config: RunConfig,
    run_context: RunContext,
    *,
    baseline: Baseline | None = None,
    earlier: Pruned | None = None,
) -> Pruned:
    """Score, cut, refit and distill: one round, without the fine-tuning.

    The round cuts `original`, for which there may be a `baseline`, or else the network of the round
    before, `earlier`.
    """
    run_context = run_context.collecting_unreadable(config)
    asked, config = config, resolve_config(config, dataset, original)
    notes = describe_inputs(asked, config, dataset)
    hint = "" if config.model.reparameterize or earlier is not None else branches_hint(original)
    try:
        this = begin_round(
            original, dataset, config, run_context, baseline=baseline, earlier=earlier
        )
        cut = stages.cut(this)
    except TargetError as error:
        if not hint:
            raise
        raise TargetError(f"{error}; {hint}") from error
    if hint:
        notes = (*notes, f"{hint}.")
    refit = stages.refit(this, cut) if config.refit.is_any else None
    distilled = stages.distill(this, cut) if config.distill.epochs else None
    pruned = _collect(this, notes, cut, refit, distilled)
    return pruned if earlier is None else _merge(earlier, pruned)


def finetune(
    pruned: Pruned,
    original: nn.Module,
    dataset: DataSet,
    run_context: RunContext,
    checkpoints: Path | None = None,
) -> Pruned:
    """Fine-tune the network in place as its configuration says, with `original` as its teacher.

    Training resumes from the checkpoints in the folder `checkpoints`, if one is given, and leaves
    new ones there.
    """
    run_context = run_context.collecting_unreadable(pruned.result.config)
    finetuned = stages.finetune(pruned, original, dataset, run_context, checkpoints)
    other_stages = (
        stage
        for stage in pruned.result.stages
        if (stage.stage, stage.round) != ("finetuned", pruned.round)
    )
    changes = {
        "finetuning": finetuned.finetuning,
        "stages": (*other_stages, finetuned.result),
        "unreadable": _sorted_union(pruned.result.unreadable, run_context.unreadable_files),
    }
    return replace(pruned, result=pruned.result.model_copy(update=changes))


def _collect(
    this: Round,
    notes: tuple[str, ...],
    cut: CutStage,
    refit: RefitStage | None,
    distilled: DistillStage | None,
) -> Pruned:
    """Return the result of a round, with filters numbered as in its network."""
    plan = replace(cut.plan, weights=this.weights)
    dependencies = this.context.dependencies
    outcome = RefitOutcome() if refit is None else refit.outcome
    sensitivity = this.plan_inputs.allocation.sensitivity or {}
    round_stages = (stage.result for stage in (cut, refit, distilled) if stage is not None)
    unreadable = _sorted_union(this.unreadable, this.run_context.unreadable_files)
    if unreadable:
        this.run_context.log.write("unreadable", files=unreadable)
    result = RunResult(
        task=this.context.task,
        concepts=this.context.concepts,
        has_labels=this.dataset.has_labels,
        command=this.run_context.command,
        config=this.config,
        environment=environment(device_of(this.network)),
        engine_version=find_engine(this.config.plan.engine).version,
        class_names=this.dataset.class_names,
        kept_classes=this.dataset.kept,
        plan_hash=plan.hash,
        equivalence_error=cut.equivalence_error,
        stages=(*this.stages, *round_stages),
        groups=tuple(
            GroupResult(
                name=name,
                filters=len(group),
                removed=plan.removed.get(name, ()),
                scores=tuple(this.plan_inputs.scores.scores[name].tolist()),
                sensitivity=tuple(float(f"{error:.4g}") for error in sensitivity.get(name, ())),
            )
            for name, group in dependencies.groups.items()
        ),
        splits=tuple(
            SplitResult(
                name=name,
                form=form_of(this.context.dependencies.shapes[f"{name}.weight"]),
                rank=rank,
                sizes=shapes_of_factors(cut.network, name),
            )
            for name, rank in plan.ranks.items()
        ),
        dropped=_dropped(dependencies, dropped_branches(this.network, dependencies, plan)),
        frozen=tuple(
            FrozenResult(name=group.name, filters=group.size, reason=group.reason)
            for group in dependencies.frozen
        ),
        size_trials=cut.size_trials,
        refit=outcome.layers,
        refit_check=outcome.check,
        batchnorm_recalibration=outcome.batchnorm,
        distillation=None if distilled is None else distilled.distillation,
        finetuning=None,
        unreadable=unreadable,
        requested_batch_size=this.requested_batch_size,
        notes=(*notes, *this.notes, *filter(None, [plan.note])),
    )
    return Pruned(
        cut.network, plan, result, this.plan_inputs.latency, dependencies, this.predictions
    )


def _dropped(
    dependencies: DependencyGraph, branches: Sequence[ResidualBranch]
) -> tuple[DroppedResult, ...]:
    macs, params = (
        dropped_savings(dependencies, branches, quantity)({}) for quantity in ("macs", "params")
    )
    return tuple(
        DroppedResult(
            name=branch.name,
            module=branch.module,
            macs=int(macs[number]),
            params=int(params[number]),
        )
        for number, branch in enumerate(branches)
    )


def _merge(earlier: Pruned, later: Pruned) -> Pruned:
    """Return the later round's network, its removed filters numbered as in the original."""
    groups = merge_rounds(earlier.result.groups, later.result.groups)
    plan = replace(
        earlier.plan,
        removed={group.name: group.removed for group in groups if group.removed},
        budget=later.result.config.plan.budget,
    )
    changes = {
        "plan_hash": plan.hash,
        "equivalence_error": max(later.result.equivalence_error, earlier.result.equivalence_error),
        "groups": groups,
        "frozen": earlier.result.frozen,
        "notes": tuple(dict.fromkeys((*earlier.result.notes, *later.result.notes))),
    }
    result = later.result.model_copy(update=changes)
    return replace(earlier, model=later.model, plan=plan, result=result)


def _sorted_union(*names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set().union(*names)))
