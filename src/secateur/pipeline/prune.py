"""The whole method: score, plan, cut, refit, polish, fine-tune, and a score after every step."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur import data
from secateur.config import RunConfig, parse_budget
from secateur.data import Batch, DataSet, Images, Unreadable, split_calibration
from secateur.data.preprocessing import Preprocessing
from secateur.errors import DataError, UnknownName, UsageError
from secateur.evaluation.evaluate import Score, evaluate
from secateur.graph.build import build_dependency_graph
from secateur.graph.dependency import DependencyGraph
from secateur.models import user_code, zoo
from secateur.pipeline.result import (
    FinetuneResult,
    FrozenResult,
    GroupResult,
    Kept,
    Origin,
    RunResult,
    Stage,
    StageResult,
    has_collapsed,
    merge_rounds,
)
from secateur.pruning.apply import apply_plan
from secateur.pruning.cost.batch_size import batch_that_fits
from secateur.pruning.cost.latency_model import LatencyTable
from secateur.pruning.cost.latency_profiler import measure_fraction_left
from secateur.pruning.equivalence import check_equivalence, check_finite
from secateur.pruning.outcome import RefitOutcome, SizeTrial
from secateur.pruning.plan import PruningPlan
from secateur.pruning.plan_inputs import CalibrationImages, PlanInputs, make_plan_inputs
from secateur.pruning.refit.layerwise import RefitInputs
from secateur.pruning.refit.refit_and_check import RefitImages, refit_and_check
from secateur.pruning.size_search import bisect, plan_in_time, smallest_kept
from secateur.runtime import distributed
from secateur.runtime.environment import environment
from secateur.runtime.event_log import EventLog
from secateur.runtime.hashing import weights_hash
from secateur.runtime.memory import free_bytes
from secateur.runtime.module_state import device_of, tensors_of, unwrapped
from secateur.runtime.progress import ProgressCallback, no_progress
from secateur.scoring import concepts, criteria
from secateur.scoring.concepts import ConceptSource
from secateur.scoring.criteria import Criterion
from secateur.training.checkpoint import Checkpoints
from secateur.training.distill import Distillation, distill
from secateur.training.feature_distillation import ResidualSum, residual_sums
from secateur.training.trainer import TrainingCallbacks, train
from secateur.training.training_data import TrainingData


def origin(config: RunConfig) -> Origin:
    """What the network of a resolved configuration was before the cut, for its run folder."""
    size = config.data.image_size
    assert size is not None
    return Origin(
        config.model.name, (3, size, size), config.plan.prune_residual, config.plan.exclude
    )


def load_inputs(config: RunConfig, *, new_head: bool = False) -> tuple[DataSet, nn.Module]:
    """The data set and the network that a configuration names; `new_head`: see `load_weights`."""
    dataset = data.load(
        config.data.source,
        validation_fraction=config.data.validation_fraction,
        seed=config.seed,
    )
    num_classes = config.model.num_classes or len(dataset.class_names)
    if not num_classes:
        raise UsageError("without data the number of classes must be given: --num-classes")
    if num_classes < len(dataset.class_names):
        raise DataError(
            f"{config.data.source} has {len(dataset.class_names)} classes, but the network is to "
            f"tell {num_classes} classes apart: --num-classes must not be less"
        )
    model = zoo.load(
        config.model.name,
        config.model.weights,
        num_classes=num_classes,
        new_head=new_head,
        seed=config.seed,
    )
    return dataset, model


def check_weights(config: RunConfig, *, allow_untrained: bool) -> None:
    """Raises `UsageError` where a network that needs a weight file has none."""
    is_own_code = user_code.is_user_code(config.model.name)
    if config.model.weights is None and not is_own_code and not allow_untrained:
        raise UsageError(
            f"{config.model.name} needs --weights (or --allow-untrained, with random weights)"
        )


def check_names(config: RunConfig) -> None:
    """Raises `UnknownName` where the network, criterion or concept source does not exist."""
    zoo.check_name(config.model.name)
    criteria.check_name(config.score.criterion)
    concepts.parse(config.score.concepts)


def resolved(config: RunConfig, dataset: DataSet) -> RunConfig:
    """The configuration with every default that depends on the network or the data filled in."""
    expected = preprocessing(config)
    filled = {
        "image_size": expected.image_size,
        "mean": expected.mean,
        "std": expected.std,
        "interpolation": expected.interpolation,
    }
    classes = config.model.num_classes or len(dataset.class_names)
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=filled),
            "model": config.model.model_copy(update={"num_classes": classes}),
        }
    )


def preprocessing(config: RunConfig) -> Preprocessing:
    """What the network expects of its images, unless the configuration says otherwise."""
    published = zoo.preprocessing(config.model.name)
    size = config.data.image_size or published.image_size
    return Preprocessing(
        image_size=size,
        resize=round(size * published.resize / published.image_size),
        mean=config.data.mean or published.mean,
        std=config.data.std or published.std,
        interpolation=config.data.interpolation or published.interpolation,
    )


@dataclass(frozen=True, eq=False)
class ScoringContext:
    """What filters are scored on: the calibration set, the dependency graph, and where concepts are
    found."""

    calibration: Images
    example: Tensor
    """A few calibration images `[image, rgb, height, width]`, normalised."""
    dependencies: DependencyGraph
    source: ConceptSource
    batch_size: int
    """Images at a time that there is memory for, at most those of the configuration."""
    unreadable: Unreadable | None = None
    """Notes calibration images that can't be read, where those are left out."""


def make_unreadable(config: RunConfig) -> Unreadable | None:
    """What notes the images that can't be read; None where they are an error."""
    return Unreadable() if config.data.skip_unreadable else None


def names_of(unreadable: Unreadable | None) -> tuple[str, ...]:
    """The files that were left out, by any process, sorted."""
    own = () if unreadable is None else unreadable.names
    return tuple(sorted({name for names in distributed.all_gather(own) for name in names}))


def make_scoring_context(
    model: nn.Module,
    dataset: DataSet,
    config: RunConfig,
    unreadable: Unreadable | None = None,
    dependencies: DependencyGraph | None = None,
    names: Sequence[str] = (),
) -> ScoringContext:
    """Draws the calibration set and reads the network's dependency graph, as `config` says, if it
    is not known.

    `names` are the criteria that filters will be scored by: some take more memory.

    Concepts that are annotated bring images of their own: those are the calibration set then.
    Raises `SecateurError`.
    """
    text = config.score.concepts
    annotated = concepts.annotated_images(text)
    probe = data.draw_calibration_images(
        dataset.train if annotated is None else annotated,
        config.data.calibration_images,
        stratified=config.data.stratified and annotated is None,
        seed=config.seed,
    )
    size = min(8, config.data.batch_size)
    expected = preprocessing(config)
    first = next(iter(data.batches(probe, size, expected, unreadable=unreadable)), None)
    if first is None:
        raise DataError(f"none of {len(probe.labels)} calibration images can be read")
    example = first.images
    if dependencies is None:
        dependencies = build_dependency_graph(
            model, example, prune_residual=config.plan.prune_residual, exclude=config.plan.exclude
        )
    check_finite(model, dependencies, example)
    source = concepts.make(
        text, dependencies.graph, tensors_of(model), dataset.class_names, expected
    )
    needs = {need for name in names for need in make_criterion(name, source, config).needs}
    free = min(distributed.all_gather(free_bytes(device_of(model))))
    fits = batch_that_fits(
        dependencies, config.data.batch_size, free, with_gradients="gradients" in needs
    )
    return ScoringContext(probe, example, dependencies, source, fits, unreadable)


def make_criterion(name: str, source: ConceptSource, config: RunConfig) -> Criterion:
    """The named criterion with the votes of concepts weighed as `config` says.

    Raises `UnknownName` where a weight is given for no concept of the source.
    """
    given = config.score.concept_weights
    known = {name for each in source.concepts for name in (each.name, each.category)}
    for concept in given:
        if concept not in known:
            raise UnknownName("concept", concept, known)
    weights = {
        number: given.get(concept.name, given.get(concept.category, 1.0))
        for number, concept in enumerate(source.concepts)
        if concept.name in given or concept.category in given
    }
    return criteria.make(name, config.score, config.seed, weights)


def stream(
    images: Images,
    config: RunConfig,
    progress: ProgressCallback,
    title: str,
    unreadable: Unreadable | None = None,
) -> Iterable[Batch]:
    """The images in batches as `config` says, with progress shown under a title.

    Of several processes each gets its share of the batches (`distributed.dealt`). For images that
    can't be read see `data.batches`.
    """
    chunks = torch.arange(len(images.labels)).split(config.data.batch_size)
    own = images.take(torch.cat([*distributed.shard(chunks), chunks[0][:0]]))
    return _batches(own, config, progress, title, unreadable)


def calibration_batches(
    context: ScoringContext, config: RunConfig, progress: ProgressCallback, title: str
) -> Iterable[Batch]:
    """This process's share of the calibration images, with their numbers in the calibration set."""
    share = distributed.rank_and_world_size()
    config = with_batches(config, context.batch_size)
    return _batches(context.calibration, config, progress, title, context.unreadable, share)


def with_batches(config: RunConfig, size: int) -> RunConfig:
    """The configuration with at most so many images at a time."""
    size = min(size, config.data.batch_size)
    return config.model_copy(update={"data": config.data.model_copy(update={"batch_size": size})})


def _batches(
    images: Images,
    config: RunConfig,
    progress: ProgressCallback,
    title: str,
    unreadable: Unreadable | None,
    shard: tuple[int, int] = (0, 1),
) -> Iterable[Batch]:
    size = config.data.batch_size
    expected = preprocessing(config)
    found = data.batches(images, size, expected, shard=shard, unreadable=unreadable)
    return progress(found, title, math.ceil(len(images.labels) / (size * shard[1])))


def collect_plan_inputs(
    model: nn.Module,
    context: ScoringContext,
    config: RunConfig,
    progress: ProgressCallback = no_progress,
    names: Sequence[str] = (),
) -> dict[str, PlanInputs]:
    """By criterion: scores and all else that plans for `model` follow from, as `config` says.

    Without `names` the criterion is that of `config`. All come from one pass over the images.
    """
    return make_plan_inputs(
        model,
        context.dependencies,
        CalibrationImages(
            lambda: calibration_batches(context, config, progress, "scoring filters"),
            lambda: _batches(
                context.calibration,
                with_batches(config, context.batch_size),
                no_progress,
                "",
                context.unreadable,
            ),
            context.example,
        ),
        {
            name: make_criterion(name, context.source, config)
            for name in names or (config.score.criterion,)
        },
        context.source,
        config.score,
        config.plan,
        progress=progress,
    )


@dataclass(frozen=True, eq=False)
class Baseline:
    """What runs on one network and one calibration set share, whatever their criterion and
    target."""

    before: Score
    """Of the network on the test images."""
    context: ScoringContext
    plan_inputs: Mapping[str, PlanInputs]
    """By criterion."""
    seconds: float
    """What all but the score took."""


def make_baseline(
    model: nn.Module,
    dataset: DataSet,
    config: RunConfig,
    names: Sequence[str] = (),
    progress: ProgressCallback = no_progress,
) -> Baseline:
    """Scores `model` and its filters, by the named criteria or by that of `config`."""
    config = resolved(config, dataset)
    unreadable = make_unreadable(config)
    since = time.perf_counter()
    names = names or (config.score.criterion,)
    context = make_scoring_context(model, dataset, config, unreadable, names=names)
    surveys = collect_plan_inputs(model, context, config, progress, names)
    seconds = time.perf_counter() - since
    config = with_batches(config, context.batch_size)
    images = stream(dataset.test, config, progress, "scoring (before)", unreadable)
    return Baseline(evaluate(model, images), context, surveys, seconds)


def refit_in_place(
    model: nn.Module,
    smaller: nn.Module,
    context: ScoringContext,
    plan: PruningPlan,
    config: RunConfig,
    progress: ProgressCallback = no_progress,
) -> RefitOutcome:
    """Repairs the cut network in place on the calibration images, as `config` says; see
    `repair`."""
    fit, held_out = split_calibration(context.calibration)
    return refit_and_check(
        RefitInputs(model, smaller, context.dependencies, plan.removed),
        RefitImages(
            lambda: calibration_batches(context, config, no_progress, ""),
            lambda: stream(fit, config, progress, "re-estimating norms", context.unreadable),
            lambda: stream(held_out, config, no_progress, "", context.unreadable),
        ),
        config.refit,
        seed=config.seed,
        progress=progress,
    )


def _search(
    model: nn.Module,
    dataset: DataSet,
    context: ScoringContext,
    survey: PlanInputs,
    config: RunConfig,
    progress: ProgressCallback,
    log: EventLog,
) -> tuple[SizeTrial, ...]:
    """Networks of several sizes, cut and refitted, on the validation images."""
    assert config.plan.max_drop is not None
    target = parse_budget(config.plan.target)

    def accuracy(network: nn.Module) -> float:
        images = stream(dataset.validation, config, no_progress, "", context.unreadable)
        return evaluate(network, images).top1_fraction

    def attempt(fraction_left: float) -> float:
        plan = survey.plan(replace(target, fraction_left=fraction_left))
        smaller = apply_plan(model, context.dependencies, plan)
        if config.refit.is_any:
            refit_in_place(model, smaller, context, plan, config, progress)
        found = accuracy(smaller)
        log.write("trial", fraction_left=fraction_left, validation_top1_fraction=found)
        return found

    before = accuracy(model)
    limit = before - config.plan.max_drop / 100
    return (SizeTrial(1.0, before, kept=True), *bisect(attempt, limit, survey.least(target)))


@dataclass(frozen=True, eq=False)
class Pruned:
    """A smaller network and what is known of it."""

    model: nn.Module
    plan: PruningPlan
    result: RunResult
    latency: LatencyTable | None
    """Times of the layers before the cut, where the target is one of latency."""
    dependencies: DependencyGraph
    """Of the network before the first cut."""

    @property
    def round(self) -> int:
        """How often it has been cut."""
        return self.result.stages[-1].round

    @property
    def is_finetuned(self) -> bool:
        """Whether it has been fine-tuned since the last cut, or is not to be."""
        return (
            self.result.config.finetune.epochs == 0 or self.result.stages[-1].stage == "finetuned"
        )

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.is_finetuned and self.round == self.result.config.plan.rounds


def prune(
    model: nn.Module,
    dataset: DataSet,
    config: RunConfig,
    *,
    start: Baseline | None = None,
    progress: ProgressCallback = no_progress,
    log: EventLog | None = None,
    checkpoints: Path | None = None,
    command: str | None = None,
) -> Pruned:
    """A smaller copy of `model`, fine-tuned where `config` says so; `model` itself is not changed.

    Where `config.plan.rounds` says so, several rounds each cut, re-estimate and fine-tune the
    network of the one before.

    `config.model` only says what the network is called; `model` is what is pruned, and `start` may
    be what is known of it. Test images are scored and nothing else. Fine-tuning goes on from what
    is in the folder `checkpoints`, if one is given. Raises `SecateurError`: see `errors`.
    """
    pruned = cut(model, dataset, config, start=start, progress=progress, log=log, command=command)
    while not pruned.is_finished:
        if pruned.is_finetuned:
            config, command = pruned.result.config, pruned.result.command
            pruned = cut(
                model, dataset, config, earlier=pruned, progress=progress, log=log, command=command
            )
        else:
            kept = checkpoints and checkpoints / f"round-{pruned.round}"
            pruned = finetune(
                pruned,
                model,
                dataset,
                progress=progress,
                log=log,
                checkpoints=None if kept is None else Checkpoints(kept),
            )
    return pruned


def finetune(
    pruned: Pruned,
    model: nn.Module,
    dataset: DataSet,
    *,
    progress: ProgressCallback = no_progress,
    log: EventLog | None = None,
    checkpoints: Checkpoints | None = None,
) -> Pruned:
    """The network fine-tuned as its configuration says, in place, with `model` as its teacher.

    See `train` for `checkpoints`. The last epoch's weights stay, or those of the epoch that was
    best on the validation images; both are scored on the test images. Where the training has broken
    the network (see `has_collapsed`) it stays as it came.
    """
    log = log or EventLog(None)
    smaller, config, number = pruned.model, pruned.result.config, pruned.round
    start = {name: tensor.clone() for name, tensor in smaller.state_dict().items()}
    unreadable = make_unreadable(config)

    def validate(network: nn.Module) -> float:
        images = stream(dataset.validation, config, progress, "validating", unreadable)
        return evaluate(network, images).top1_fraction

    training = train(
        smaller,
        model,
        TrainingData(dataset.train, preprocessing(config), unreadable),
        config.finetune,
        seed=config.seed,
        sums=_sums(pruned) if config.finetune.feature_weight else (),
        callbacks=TrainingCallbacks(
            progress,
            validate,
            lambda epoch: log.write("epoch", round=number, **asdict(epoch)),
        ),
        checkpoints=checkpoints,
    )
    assert training.before is not None
    came = pruned.result.stages[-1].score  # of the weights that were trained

    def score(state: dict[str, Tensor]) -> Score:
        network = copy.deepcopy(smaller)
        network.load_state_dict(state)
        images = stream(dataset.test, config, progress, "scoring (tuned)", unreadable)
        return evaluate(network, images, known_ms=came.latency_ms)

    earlier = tuple(
        each for each in pruned.result.stages if (each.stage, each.round) != ("finetuned", number)
    )
    last, best = score(training.last), score(training.best)
    kept: Kept = config.finetune.keep
    if kept == "last" and has_collapsed(training.before, training.epochs):
        kept = "start"
        smaller.load_state_dict(start)
    tuning = FinetuneResult(
        epochs=training.epochs,
        before_top1_fraction=training.before,
        best_epoch=training.best_epoch,
        ended=training.ended,
        last=last,
        best=best,
        kept=kept,
    )
    found = {"last": last, "best": best, "start": came}[kept]
    stage = StageResult(stage="finetuned", round=number, score=found, seconds=training.seconds)
    log.write("stage", **stage.model_dump())
    stages = (*earlier, stage)
    missing = _missing(pruned, unreadable)
    changes = {"tuning": tuning, "stages": stages, "unreadable": missing}
    result = pruned.result.model_copy(update=changes)
    return replace(pruned, result=result)


def _missing(earlier: Pruned | None, unreadable: Unreadable | None) -> tuple[str, ...]:
    """The files that were left out, in this step and in those before it, sorted."""
    before = () if earlier is None else earlier.result.unreadable
    return tuple(sorted({*before, *names_of(unreadable)}))


def _sums(pruned: Pruned) -> tuple[ResidualSum, ...]:
    return residual_sums(pruned.dependencies, pruned.plan.removed)


def cut(
    model: nn.Module,
    dataset: DataSet,
    config: RunConfig,
    *,
    earlier: Pruned | None = None,
    start: Baseline | None = None,
    progress: ProgressCallback = no_progress,
    log: EventLog | None = None,
    command: str | None = None,
) -> Pruned:
    """The network of the next round, cut, re-estimated and polished, not fine-tuned; see `prune`.

    What is cut is the network of the round before, `earlier`, or else `model`, of which `start` may
    be known.
    """
    log = log or EventLog(None)
    config = resolved(config, dataset)
    current, number = (model, 1) if earlier is None else (earlier.model, earlier.round + 1)
    stages = [] if earlier is None else [*earlier.result.stages]
    if earlier is None:
        start = start or make_baseline(model, dataset, config, progress=progress)
        context, surveys, prepared = start.context, start.plan_inputs, start.seconds
    else:
        since = time.perf_counter()
        names = (config.score.criterion,)
        context = make_scoring_context(
            current, dataset, config, make_unreadable(config), names=names
        )
        surveys = collect_plan_inputs(current, context, config, progress)
        prepared = time.perf_counter() - since
    dependencies, survey, unreadable = (
        context.dependencies,
        surveys[config.score.criterion],
        context.unreadable,
    )
    asked = None if earlier is None else earlier.result.requested_batch_size
    if context.batch_size < config.data.batch_size:
        asked = config.data.batch_size
        log.write("batch_size", asked=config.data.batch_size, taken=context.batch_size)
        config = with_batches(config, context.batch_size)

    def note(stage: Stage, found: Score, seconds: float) -> None:
        stages.append(StageResult(stage=stage, round=number, score=found, seconds=seconds))
        log.write("stage", **stages[-1].model_dump())

    if earlier is None and start is not None:
        note("before", start.before, 0.0)
    since = time.perf_counter() - prepared
    if survey.latency is not None:
        log.write("latency", **survey.latency.model_dump(exclude={"layers"}))
    target = parse_budget(config.plan.target)
    # Every round leaves the same share of what the one before has left.
    target = replace(target, fraction_left=target.fraction_left ** (1 / config.plan.rounds))
    trials: tuple[SizeTrial, ...] = ()
    if config.plan.max_drop is not None:
        trials = _search(model, dataset, context, survey, config, progress, log)
        target = replace(target, fraction_left=smallest_kept(trials))
    if target.quantity == "latency" and config.plan.max_drop is None and target.fraction_left < 1:
        found = distributed.on_main_process(
            lambda: plan_in_time(
                current,
                dependencies,
                lambda fraction: survey.plan(replace(target, fraction_left=fraction)),
                target.fraction_left,
                survey.least(target),
                context.example,
            )
        )
        plan = replace(found[0], budget=target)
        log.write("latency_left", fraction=found[1])
    else:
        plan = survey.plan(target)
    smaller = apply_plan(current, dependencies, plan)
    equivalence_error = check_equivalence(current, dependencies, plan, smaller, context.example)
    seconds = time.perf_counter() - since
    # Of all stages of this round: neither repairs nor training change what a pass computes.
    left = distributed.on_main_process(
        lambda: measure_fraction_left(model, smaller, context.example)
    )
    known_ms = left * stages[0].score.latency_ms

    def score(stage: Stage, seconds: float) -> None:
        images = stream(dataset.test, config, progress, f"scoring ({stage})", unreadable)
        note(stage, evaluate(smaller, images, known_ms=known_ms), seconds)

    score("cut", seconds)

    repaired = RefitOutcome()
    if config.refit.is_any:
        since = time.perf_counter()
        repaired = refit_in_place(current, smaller, context, plan, config, progress)
        score("refit", time.perf_counter() - since)

    polished: Distillation | None = None
    fit, held_out = split_calibration(context.calibration)
    if config.distill.epochs:
        since = time.perf_counter()
        polished = distill(
            model,
            smaller,
            TrainingData(fit, preprocessing(config), unreadable),
            lambda: stream(held_out, config, no_progress, "", unreadable),
            config.distill,
            seed=config.seed,
            progress=progress,
        )
        for each in polished.epochs:
            log.write("distill", **asdict(each))
        score("distilled", time.perf_counter() - since)

    groups = tuple(
        GroupResult(
            name=name,
            filters=len(group),
            removed=plan.removed.get(name, ()),
            scores=tuple(survey.scores.scores[name].tolist()),
        )
        for name, group in dependencies.groups.items()
    )
    frozen = tuple(
        FrozenResult(name=group.name, filters=group.size, reason=group.reason)
        for group in dependencies.frozen
    )
    if earlier is not None:
        groups = merge_rounds(earlier.result.groups, groups)
        frozen = earlier.result.frozen
        equivalence_error = max(equivalence_error, earlier.result.equivalence_error)
        removed = {group.name: group.removed for group in groups if group.removed}
        plan = replace(earlier.plan, removed=removed, budget=parse_budget(config.plan.target))
    else:
        plan = replace(plan, weights=weights_hash(tensors_of(unwrapped(model))))
    result = RunResult(
        command=command,
        config=config,
        environment=environment(),
        class_names=dataset.class_names,
        plan_hash=plan.hash,
        equivalence_error=equivalence_error,
        stages=tuple(stages),
        groups=groups,
        frozen=frozen,
        size_trials=trials,
        refit=repaired.layers,
        refit_check=repaired.check,
        batchnorm_recalibration=repaired.batchnorm,
        distillation=polished,
        finetuning=None,
        unreadable=_missing(earlier, unreadable),
        requested_batch_size=asked,
    )
    if result.unreadable:
        log.write("unreadable", files=result.unreadable)
    if earlier is not None:
        return Pruned(smaller, plan, result, earlier.latency, earlier.dependencies)
    return Pruned(smaller, plan, result, survey.latency, dependencies)
