"""A network looked at without changing it: what its filters see, and how they score."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from secateur.config import RunConfig
from secateur.errors import UnknownName
from secateur.experiments.filter_pictures import draw_layer
from secateur.pipeline.dissect import VOTES, dissect_network
from secateur.pipeline.prune import (
    check_names,
    load_inputs,
    make_scoring_context,
    make_unreadable,
    names_of,
)
from secateur.runtime import distributed
from secateur.runtime.atomic_io import make_folder
from secateur.runtime.progress import ProgressCallback, no_progress

TOP_IMAGES = 5
"""Images that are shown of each filter."""
NEEDED = 0.9
"""Share of a layer's votes that the filters counted as needed hold together."""
ROWS = 14
"""Rows and columns that a region is told in at most."""


def filters_needed(votes: Sequence[float]) -> int:
    """How many of the filters of a layer hold `NEEDED` of its votes; the others have few."""
    sums = list(itertools.accumulate(sorted(votes, reverse=True)))
    return next(number for number, total in enumerate(sums, 1) if total >= NEEDED * sums[-1])


def _as_rows(region: Bool[Tensor, "h w"]) -> list[str]:
    """Where a filter is active, a text a row: `#` or `.`."""
    side = min(ROWS, max(region.shape))
    size = tuple(-(-length * side // max(region.shape)) for length in region.shape)
    cells = F.adaptive_max_pool2d(region[None].float(), size)[0]
    return ["".join("#" if cell else "." for cell in row) for row in cells.tolist()]


def inspect_network(
    config: RunConfig,
    criterion_names: tuple[str, ...],
    *,
    pictures: Path | None = None,
    progress: ProgressCallback = no_progress,
) -> dict[str, Any]:
    """What `secateur inspect --json` prints: facts of each layer and of each of its filters.

    `needed` counts the filters that hold `NEEDED` of a layer's votes; `top_regions` is where each
    filter is active in its first top image. Every calibration image counts towards means and
    thresholds. With `pictures` a PNG a layer is written into that folder, made new if need be.
    Raises `SecateurError`.
    """
    for name in criterion_names:
        check_names(
            config.model_copy(update={"score": config.score.model_copy(update={"criterion": name})})
        )
    config = config.model_copy(
        update={"score": config.score.model_copy(update={"sample_every": 1})}
    )
    dataset, network = load_inputs(config)
    unreadable = make_unreadable(config)
    context = make_scoring_context(network, dataset, config, unreadable)
    dependencies = context.dependencies
    names = tuple(dict.fromkeys((*criterion_names, VOTES)))
    sights = dissect_network(network, context, config, names, images=TOP_IMAGES, progress=progress)
    whole = dependencies.count_after({})
    macs = {layer.name: layer.macs(whole) for layer in dependencies.layers}
    groups = []
    for name, group in dependencies.groups.items():
        seen, top, detectors = sights.concepts(group), sights.top(group), sights.detectors(group)
        groups.append(
            {
                "layer": name,
                "filters": len(group),
                "macs_share": macs[group.layers[0].name] / dependencies.macs(),
                "read_by": [reader.layer for reader in group.consumers],
                "scores": {
                    key: sights.scores[key].scores[name].tolist() for key in criterion_names
                },
                "needed": filters_needed(sights.scores[VOTES].scores[name].tolist()),
                "detectors": dict(detectors.most_common()),
                "unique_detectors": len(detectors),
                "concepts": [
                    {"concept": each.concept, "iou": each.iou, "is_detector": each.is_detector}
                    for each in seen
                ],
                "top_images": top.indices.tolist(),
                "top_regions": [_as_rows(some) for some in top.regions[:, 0]],
            }
        )
        if pictures is not None and distributed.is_main_process():
            make_folder(pictures)
            labels = [f"{each.concept} {each.iou:.2f}" for each in seen]
            draw_layer(pictures / f"{name}.png", context, config, top, labels)
    frozen = [
        {"layer": group.name, "filters": group.size, "reason": group.reason}
        for group in dependencies.frozen
    ]
    return {
        "model": config.model.name,
        "macs": dependencies.macs(),
        "parameters": dependencies.params(),
        "calibration_images": len(context.calibration.labels),
        "unreadable": list(names_of(unreadable)),
        "concept_source": config.score.concepts,
        "groups": groups,
        "frozen": frozen,
    }


def group_of(found: dict[str, Any], layer: str) -> dict[str, Any]:
    """What is known of a layer; raises `UnknownName` where none of that name can be cut."""
    groups = {group["layer"]: group for group in found["groups"]}
    if layer not in groups:
        raise UnknownName("prunable layer", layer, groups)
    group: dict[str, Any] = groups[layer]
    return group
