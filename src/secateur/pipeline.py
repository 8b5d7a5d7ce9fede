"""The whole method: score, plan, cut, refit, polish, fine-tune, and a score after every step."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur import bundle, concepts, criteria, data, models
from secateur.bundle import EventLog, Origin
from secateur.concepts import ConceptSource
from secateur.config import RunConfig, to_toml
from secateur.criteria import Criterion
from secateur.data import Batch, DataSet, Images, Unreadable, set_apart
from secateur.errors import DataError, UnknownName, UsageError
from secateur.evaluate import evaluate
from secateur.finetune import Epoch, finetune
from secateur.graph import tensors_of
from secateur.latency import LatencyTable
from secateur.manifest import CONFIG
from secateur.models import Preprocessing
from secateur.norms import NormChange, reestimate_norms
from secateur.plan import PruningPlan, parse_target
from secateur.polish import Polish, polish
from secateur.progress import Track, silent
from secateur.reading import make_wiring
from secateur.refit import LayerRefit, refit
from secateur.report import write_report
from secateur.result import (
    EpochResult,
    FrozenResult,
    GroupResult,
    RunResult,
    Stage,
    StageResult,
    environment,
)
from secateur.search import Trial, bisect, smallest_kept
from secateur.surgery import apply_plan, relative_error, silence
from secateur.survey import Survey, make_survey
from secateur.wiring import Wiring


def run(
    config: RunConfig,
    folder: Path,
    *,
    overwrite: bool = False,
    allow_untrained: bool = False,
    track: Track = silent,
    command: str | None = None,
) -> RunResult:
    """Prunes the network that `config` names and leaves a run folder; see `bundle` for its files.

    Raises `SecateurError`, and then leaves nothing behind.
    """
    bundle.check_free(folder, overwrite=overwrite)
    check_names(config)
    check_weights(config, allow_untrained=allow_untrained)
    dataset, model = load_inputs(config)
    with bundle.new_run_folder(folder, overwrite=overwrite) as temporary:
        log = EventLog(temporary / bundle.LOG)
        log.write("start", command=command, config=config.model_dump(mode="json"))
        pruned = prune(model, dataset, config, track=track, log=log, command=command)
        config = pruned.result.config
        (temporary / CONFIG).write_text(to_toml(config), encoding="utf-8")
        manifest = bundle.write(temporary, pruned.model, pruned.plan, origin(config))
        if manifest.no_program is not None:
            log.write("no_program", reason=manifest.no_program)
        text = pruned.result.model_dump_json(indent=1)
        (temporary / bundle.RESULT).write_text(text + "\n", encoding="utf-8")
        if pruned.latency is not None:
            (temporary / bundle.LATENCY).write_text(pruned.latency.to_json(), encoding="utf-8")
        write_report(pruned.result, temporary / bundle.REPORT)
        log.write("end")
    return pruned.result


def origin(config: RunConfig) -> Origin:
    """What the network of a resolved configuration was before the cut, for its run folder."""
    size = config.data.image_size
    assert size is not None
    return Origin(config.model.name, (3, size, size), config.plan.cut_stream, config.plan.exclude)


def load_inputs(config: RunConfig) -> tuple[DataSet, nn.Module]:
    """The data set and the network that a configuration names."""
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
    model = models.load(
        config.model.name, config.model.weights, num_classes=num_classes, seed=config.seed
    )
    return dataset, model


def check_weights(config: RunConfig, *, allow_untrained: bool) -> None:
    """Raises `UsageError` where a network that needs a weight file has none."""
    is_own_code = models.is_own_code(config.model.name)
    if config.model.weights is None and not is_own_code and not allow_untrained:
        raise UsageError(
            f"{config.model.name} needs --weights (or --allow-untrained, with random weights)"
        )


def check_names(config: RunConfig) -> None:
    """Raises `UnknownName` where the network, criterion or concept source does not exist."""
    models.check_name(config.model.name)
    if config.score.criterion not in criteria.CRITERIA:
        raise UnknownName("criterion", config.score.criterion, criteria.CRITERIA)
    concepts.parse(config.score.concepts)


def resolved(config: RunConfig, dataset: DataSet) -> RunConfig:
    """The configuration with every default that depends on the network or the data filled in."""
    expected = preprocessing(config)
    filled = {"image_size": expected.image_size, "mean": expected.mean, "std": expected.std}
    classes = config.model.num_classes or len(dataset.class_names)
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=filled),
            "model": config.model.model_copy(update={"num_classes": classes}),
        }
    )


def preprocessing(config: RunConfig) -> Preprocessing:
    """What the network expects of its images, unless the configuration says otherwise."""
    published = models.preprocessing(config.model.name)
    size = config.data.image_size or published.image_size
    return Preprocessing(
        image_size=size,
        resize=round(size * published.resize / published.image_size),
        mean=config.data.mean or published.mean,
        std=config.data.std or published.std,
    )


@dataclass(frozen=True, eq=False)
class Ground:
    """What filters are scored on: the probe set, the wiring, and where concepts are found."""

    probe: Images
    example: Tensor
    """A few probe images `[image, rgb, height, width]`, normalised."""
    wiring: Wiring
    source: ConceptSource
    unreadable: Unreadable | None = None
    """Notes probe images that can't be read, where those are left out."""


def make_unreadable(config: RunConfig) -> Unreadable | None:
    """What notes the images that can't be read; None where they are an error."""
    return Unreadable() if config.data.skip_unreadable else None


def prepare_ground(
    model: nn.Module, dataset: DataSet, config: RunConfig, unreadable: Unreadable | None = None
) -> Ground:
    """Draws the probe set and reads the network's wiring, as `config` says.

    Concepts that are annotated bring images of their own: those are the probe set then. Raises
    `SecateurError`.
    """
    text = config.score.concepts
    annotated = concepts.annotated_images(text)
    probe = data.draw_probe(
        dataset.train if annotated is None else annotated,
        config.data.probe_images,
        stratified=config.data.stratified and annotated is None,
        seed=config.seed,
    )
    size = min(8, config.data.batch_size)
    expected = preprocessing(config)
    first = next(iter(data.batches(probe, size, expected, unreadable=unreadable)), None)
    if first is None:
        raise DataError(f"none of {len(probe.labels)} probe images can be read")
    example = first.images
    wiring = make_wiring(
        model, example, cut_stream=config.plan.cut_stream, exclude=config.plan.exclude
    )
    source = concepts.make(text, wiring.graph, tensors_of(model), dataset.class_names, expected)
    return Ground(probe, example, wiring, source, unreadable)


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
    track: Track,
    title: str,
    unreadable: Unreadable | None = None,
) -> Iterable[Batch]:
    """The images in batches as `config` says, with progress shown under a title.

    For those that can't be read see `data.batches`.
    """
    size = config.data.batch_size
    total = math.ceil(len(images.labels) / size)
    found = data.batches(images, size, preprocessing(config), unreadable=unreadable)
    return track(found, title, total)


def survey_filters(
    model: nn.Module, ground: Ground, config: RunConfig, track: Track = silent
) -> Survey:
    """Scores and all else that plans for `model` follow from, as `config` says."""
    return make_survey(
        model,
        ground.wiring,
        lambda: stream(ground.probe, config, track, "scoring filters", ground.unreadable),
        config.score.criterion,
        make_criterion(config.score.criterion, ground.source, config),
        ground.source,
        config.score,
        config.plan,
        example=ground.example,
        track=track,
    )


@dataclass(frozen=True)
class Repair:
    """What was done in closed form to a network that had been cut."""

    layers: tuple[LayerRefit, ...]
    norms: NormChange | None


def repair_in_place(
    model: nn.Module,
    smaller: nn.Module,
    ground: Ground,
    plan: PruningPlan,
    config: RunConfig,
    track: Track = silent,
) -> Repair:
    """Re-estimates the kernels of the cut network in place, and norm statistics where it helps."""
    layers = refit(
        model,
        smaller,
        ground.wiring,
        plan,
        stream(ground.probe, config, silent, "", ground.unreadable),
        config.refit,
        seed=config.seed,
        track=track,
    )
    if not config.refit.norms:
        return Repair(layers, None)
    fit, held_out = set_apart(ground.probe)
    norms = reestimate_norms(
        model,
        smaller,
        lambda: stream(fit, config, track, "re-estimating norms", ground.unreadable),
        lambda: stream(held_out, config, silent, "", ground.unreadable),
    )
    return Repair(layers, norms)


def _search(
    model: nn.Module,
    dataset: DataSet,
    ground: Ground,
    survey: Survey,
    config: RunConfig,
    track: Track,
    log: EventLog,
) -> tuple[Trial, ...]:
    """Networks of several sizes, cut and refitted, on the validation images."""
    assert config.plan.max_drop is not None
    target = parse_target(config.plan.target)

    def accuracy(network: nn.Module) -> float:
        images = stream(dataset.validation, config, silent, "", ground.unreadable)
        return evaluate(network, images).top1_fraction

    def attempt(fraction_left: float) -> float:
        plan = survey.plan(replace(target, fraction_left=fraction_left))
        smaller = apply_plan(model, ground.wiring, plan)
        if config.refit.layers != "none":
            repair_in_place(model, smaller, ground, plan, config, track)
        found = accuracy(smaller)
        log.write("trial", fraction_left=fraction_left, validation_top1_fraction=found)
        return found

    before = accuracy(model)
    limit = before - config.plan.max_drop / 100
    return (Trial(1.0, before, kept=True), *bisect(attempt, limit, survey.least(target)))


@dataclass(frozen=True, eq=False)
class Pruned:
    """A smaller network and what is known of it."""

    model: nn.Module
    plan: PruningPlan
    result: RunResult
    latency: LatencyTable | None
    """Times of the layers before the cut, where the target is one of latency."""


def prune(
    model: nn.Module,
    dataset: DataSet,
    config: RunConfig,
    *,
    track: Track = silent,
    log: EventLog | None = None,
    command: str | None = None,
) -> Pruned:
    """A smaller copy of `model`, which itself is not changed.

    `config.model` only says what the network is called; `model` is what is pruned. Test images are
    scored and nothing else. Raises `SecateurError`: see `errors`.
    """
    log = log or EventLog(None)
    check_names(config)
    config = resolved(config, dataset)
    stages: list[StageResult] = []
    unreadable = make_unreadable(config)

    def score(stage: Stage, network: nn.Module, since: float) -> None:
        seconds = time.perf_counter() - since
        images = stream(dataset.test, config, track, f"scoring ({stage})", unreadable)
        found = evaluate(network, images)
        stages.append(StageResult(stage=stage, score=found, seconds=seconds))
        log.write("stage", **stages[-1].model_dump())

    score("before", model, time.perf_counter())

    start = time.perf_counter()
    ground = prepare_ground(model, dataset, config, unreadable)
    wiring = ground.wiring
    survey = survey_filters(model, ground, config, track)
    if survey.latency is not None:
        log.write("latency", **survey.latency.model_dump(exclude={"layers"}))
    target = parse_target(config.plan.target)
    trials: tuple[Trial, ...] = ()
    if config.plan.max_drop is not None:
        trials = _search(model, dataset, ground, survey, config, track, log)
        target = replace(target, fraction_left=smallest_kept(trials))
    plan = survey.plan(target)
    smaller = apply_plan(model, wiring, plan)
    with torch.inference_mode():
        expected = silence(model, wiring, plan)(ground.example)
        law_error = relative_error(smaller.eval()(ground.example), expected)
    score("cut", smaller, start)

    repair = Repair((), None)
    if config.refit.layers != "none":
        start = time.perf_counter()
        repair = repair_in_place(model, smaller, ground, plan, config, track)
        score("refit", smaller, start)

    polished: Polish | None = None
    fit, held_out = set_apart(ground.probe)
    if config.polish.epochs:
        start = time.perf_counter()
        polished = polish(
            model,
            smaller,
            fit,
            lambda: stream(held_out, config, silent, "", unreadable),
            preprocessing(config),
            config.polish,
            seed=config.seed,
            track=track,
        )
        for each in polished.epochs:
            log.write("polish", **asdict(each))
        score("polished", smaller, start)

    epochs: list[EpochResult] = []

    def after_epoch(epoch: Epoch) -> None:
        images = stream(dataset.validation, config, track, "validating", unreadable)
        found = evaluate(smaller, images)
        epochs.append(EpochResult(epoch=epoch, validation_top1_fraction=found.top1_fraction))
        log.write("epoch", **epochs[-1].model_dump())

    if config.finetune.epochs:
        start = time.perf_counter()
        finetune(
            smaller,
            model,
            dataset.train,
            preprocessing(config),
            config.finetune,
            seed=config.seed,
            track=track,
            after_epoch=after_epoch,
        )
        score("tuned", smaller, start)

    result = RunResult(
        command=command,
        config=config,
        environment=environment(),
        class_names=dataset.class_names,
        plan_hash=plan.hash,
        law_error=law_error,
        stages=tuple(stages),
        groups=tuple(
            GroupResult(
                name=name,
                filters=len(group),
                removed=plan.removed.get(name, ()),
                scores=tuple(survey.scored.scores[name].tolist()),
            )
            for name, group in wiring.groups.items()
        ),
        frozen=tuple(
            FrozenResult(name=group.name, filters=group.size, reason=group.reason)
            for group in wiring.frozen
        ),
        trials=trials,
        refit=repair.layers,
        norms=repair.norms,
        polish=polished,
        epochs=tuple(epochs),
        unreadable=() if unreadable is None else unreadable.names,
    )
    if result.unreadable:
        log.write("unreadable", files=result.unreadable)
    return Pruned(smaller, plan, result, survey.latency)
