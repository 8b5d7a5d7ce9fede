"""Inspect a network without changing it: the concepts and the scores of its filters."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor, nn

from secateur.config import RunConfig
from secateur.data import DataSet
from secateur.experiments.filter_pictures import MOST_FILTERS, draw_layer
from secateur.experiments.report.dissection_page import by_iou, write_index
from secateur.models.evaluate import evaluate_and_predict
from secateur.models.plausibility import find_doubt_about
from secateur.pipeline.dissect import NetworkDissection, dissect_network
from secateur.pipeline.inputs import check_names, describe_inputs, load_inputs, resolve_config
from secateur.pipeline.name_filters import image_words_of
from secateur.pipeline.run_context import RunContext
from secateur.pipeline.scoring_context import ScoringContext, make_scoring_context
from secateur.pruning.outcome import Sensitivity
from secateur.runtime import distributed
from secateur.runtime.atomic_io import make_folder
from secateur.runtime.errors import UnknownName
from secateur.scoring.concepts import annotated_images

TOP_IMAGES = 5
"""Images shown of each filter."""
NEEDED = 0.9
"""Share of a layer's votes that the filters counted as needed hold together."""
CHECKED_IMAGES = 500
"""Most images that a network's accuracy is looked at on."""
NEEDED_BY = "vote-response"
"""The criterion that gives those votes: the scores of `vote` are places, not numbers of votes."""
ROWS = 14
"""Largest number of rows and columns that a region is shown in."""


def filters_needed(votes: Sequence[float]) -> int:
    """Return how many filters, those with the most votes, hold `NEEDED` of a layer's votes."""
    sums = list(itertools.accumulate(sorted(votes, reverse=True)))
    return next(number for number, total in enumerate(sums, 1) if total >= NEEDED * sums[-1])


def _as_rows(region: Bool[Tensor, "h w"]) -> list[str]:
    """Return where a filter is active, one text per row: `#`, or `.` where it is not."""
    side = min(ROWS, max(region.shape))
    size = tuple(-(-length * side // max(region.shape)) for length in region.shape)
    pixels = F.adaptive_max_pool2d(region[None].float(), size)[0]
    return ["".join("#" if pixel else "." for pixel in row) for row in pixels.tolist()]


def inspect_network(
    config: RunConfig,
    criterion_names: Sequence[str],
    run_context: RunContext | None = None,
    *,
    pictures: Path | None = None,
) -> dict[str, Any]:
    """Return what `secateur inspect --json` prints: facts of each layer and of each filter.

    `needed` counts the filters that hold `NEEDED` of a layer's votes by `NEEDED_BY`; `top_regions`
    is where each filter is active in its first top image. Every calibration image counts for
    statistics and thresholds. `pictures` is a folder for `index.html` and one PNG per layer, made
    if need be. Raises `SecateurError`.
    """
    for name in criterion_names:
        check_names(_with_score(config, criterion=name))
    config = _with_score(config, sample_every=1)
    run_context = (run_context or RunContext()).collecting_unreadable(config)
    dataset, network = load_inputs(config)
    asked, config = config, resolve_config(config, dataset, network)
    context = make_scoring_context(network, dataset, config, run_context)
    notes = (
        *describe_inputs(asked, config, dataset),
        *dataset.notes,
        *context.task.notes,
        *_doubts(network, context, dataset, config),
    )
    names = tuple(dict.fromkeys((*criterion_names, NEEDED_BY)))
    image_words = image_words_of(config, context, dataset)
    dissection = dissect_network(
        network, context, config, names, images=TOP_IMAGES, image_words=image_words
    )
    dependencies = context.dependencies
    if pictures is not None and distributed.is_main_process():
        make_folder(pictures)
        concepts = {name: dissection.concepts(group) for name, group in dependencies.groups.items()}
        for name, group in dependencies.groups.items():
            labels = [f"{best.concept} {best.iou:.2f}" for best in concepts[name]]
            for number, filter_name in enumerate(dissection.names.get(name, ())):
                labels[number] += f"\n{filter_name.word}" if filter_name else ""
            order = by_iou(concepts[name])
            draw_layer(pictures / f"{name}.png", context, dissection.top(group), labels, order)
        write_index(pictures, config.model.name, concepts, MOST_FILTERS, dissection.names)
    return {
        "model": config.model.name,
        "macs": dependencies.macs(),
        "parameters": dependencies.params(),
        "calibration_images": len(context.calibration.labels),
        "unreadable": list(run_context.unreadable_files),
        "notes": list(notes),
        "concept_source": context.concepts,
        "groups": [_group_facts(name, dissection, criterion_names) for name in dependencies.groups],
        "frozen": [
            {"layer": group.name, "filters": group.size, "reason": group.reason}
            for group in dependencies.frozen
        ],
    }


def measure_network_sensitivity(
    config: RunConfig, run_context: RunContext | None = None
) -> Sensitivity:
    """Return what a network loses if filters of one layer go, for every prunable layer.

    The filters go in the order of the configuration's criterion; see `pruning.sensitivity`. Nothing
    is cut, and no label is used but by criteria that need them. Raises `SecateurError`.
    """
    names = (config.score.criterion,)
    check_names(config)
    plan = config.plan.model_copy(update={"allocation": "sensitivity", "target": "macs=1.0"})
    config = config.model_copy(update={"plan": plan})
    run_context = (run_context or RunContext()).collecting_unreadable(config)
    dataset, network = load_inputs(config)
    config = resolve_config(config, dataset, network)
    context = make_scoring_context(network, dataset, config, run_context, criterion_names=names)
    inputs = context.make_plan_inputs(network, config, run_context.progress)
    sensitivity = inputs[names[0]].allocation.sensitivity
    assert sensitivity is not None
    return sensitivity


def _doubts(
    network: nn.Module, context: ScoringContext, dataset: DataSet, config: RunConfig
) -> tuple[str, ...]:
    """Return what looks wrong about the predictions for the first calibration images, if any."""
    if config.model.allow_untrained or annotated_images(config.score.concepts) is not None:
        return ()  # labels of annotated images are not classes
    count = min(CHECKED_IMAGES, len(context.calibration.labels))
    few = context.calibration.take(torch.arange(count))
    batches = context.reader.read_shard(few)
    _, predictions = evaluate_and_predict(network, batches, task=context.task, known_ms=0.0)
    doubt = find_doubt_about(
        predictions, context.task, has_labels=dataset.has_labels, kind="calibration"
    )
    return () if doubt is None else (doubt.note(),)


def _with_score(config: RunConfig, **values: object) -> RunConfig:
    return config.model_copy(update={"score": config.score.model_copy(update=values)})


def _group_facts(
    name: str, dissection: NetworkDissection, criterion_names: Sequence[str]
) -> dict[str, Any]:
    dependencies = dissection.context.dependencies
    group = dependencies.groups[name]
    top, detectors = dissection.top(group), dissection.detectors(group)
    counts = dependencies.count_after({})
    macs = {layer.name: layer.macs(counts) for layer in dependencies.layers}
    return {
        "layer": name,
        "filters": len(group),
        "macs_share": macs[group.layers[0].name] / dependencies.macs(),
        "read_by": [consumer.layer for consumer in group.consumers],
        "scores": {
            criterion: dissection.scores[criterion].scores[name].tolist()
            for criterion in criterion_names
        },
        "needed": filters_needed(dissection.scores[NEEDED_BY].scores[name].tolist()),
        "detectors": dict(detectors.most_common()),
        "unique_detectors": len(detectors),
        "concepts": [
            {"concept": best.concept, "iou": best.iou, "is_detector": best.is_detector}
            for best in dissection.concepts(group)
        ],
        "names": [one and asdict(one) for one in dissection.names.get(name, ())],
        "top_images": top.indices.tolist(),
        "top_regions": [_as_rows(regions) for regions in top.regions[:, 0]],
    }


def group_of(inspection: dict[str, Any], layer: str) -> dict[str, Any]:
    """Return the facts of a layer; raise `UnknownName` if no prunable layer has the name."""
    groups = {group["layer"]: group for group in inspection["groups"]}
    if layer not in groups:
        raise UnknownName("prunable layer", layer, groups)
    group: dict[str, Any] = groups[layer]
    return group
