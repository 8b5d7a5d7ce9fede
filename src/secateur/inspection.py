"""A network looked at without changing it: what its filters see, and how they score."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from secateur import distributed, pipeline
from secateur.activations import parts_of
from secateur.config import RunConfig
from secateur.dissection import Dissection, TopImages
from secateur.pictures import draw_layer
from secateur.progress import Track, silent
from secateur.scoring import score_filters

TOP_IMAGES = 5
"""Images that are shown of each filter."""


def inspect_network(
    config: RunConfig,
    criterion_names: tuple[str, ...],
    *,
    pictures: Path | None = None,
    track: Track = silent,
) -> dict[str, Any]:
    """What `secateur inspect --json` prints: facts of each layer and of each of its filters.

    Every probe image counts towards means and thresholds. With `pictures` a PNG a layer is written
    into that folder, made new if need be. Raises `SecateurError`.
    """
    for name in criterion_names:
        pipeline.check_names(
            config.model_copy(update={"score": config.score.model_copy(update={"criterion": name})})
        )
    config = config.model_copy(
        update={"score": config.score.model_copy(update={"sample_every": 1})}
    )
    dataset, network = pipeline.load_inputs(config)
    unreadable = pipeline.make_unreadable(config)
    ground = pipeline.prepare_ground(network, dataset, config, unreadable)
    wiring = ground.wiring
    dissection = Dissection(tuple(concept.name for concept in ground.source.concepts))
    top = TopImages(TOP_IMAGES)
    scores = score_filters(
        network,
        wiring,
        lambda: pipeline.probe_stream(ground, config, track, "looking at filters"),
        {name: pipeline.make_criterion(name, ground.source, config) for name in criterion_names},
        ground.source,
        config.score,
        observers=(dissection, top),
    )
    top.merge()
    whole = wiring.count_after({})
    macs = {layer.name: layer.macs(whole) for layer in wiring.layers}
    groups = []
    for name, group in wiring.groups.items():
        seen = dissection.best_by_channel(group)
        detectors = Counter(each.concept for each in seen if each.is_detector)
        first = next(iter(parts_of(group)))
        groups.append(
            {
                "layer": name,
                "filters": len(group),
                "macs_share": macs[group.layers[0].name] / wiring.macs(),
                "read_by": [reader.layer for reader in group.readers],
                "scores": {key: found.scores[name].tolist() for key, found in scores.items()},
                "detectors": dict(detectors.most_common()),
                "unique_detectors": len(detectors),
                "concepts": [
                    {"concept": each.concept, "iou": each.iou, "is_detector": each.is_detector}
                    for each in seen
                ],
                "top_images": top.numbers(first).tolist(),
            }
        )
        if pictures is not None and distributed.is_first():
            pictures.mkdir(exist_ok=True)
            draw_layer(
                pictures / f"{name}.png",
                network,
                ground,
                config,
                name,
                top.numbers(first),
                dissection.thresholds[first],
                [f"{each.concept} {each.iou:.2f}" for each in seen],
            )
    frozen = [
        {"layer": group.name, "filters": group.size, "reason": group.reason}
        for group in wiring.frozen
    ]
    return {
        "model": config.model.name,
        "macs": wiring.macs(),
        "parameters": wiring.params(),
        "probe_images": len(ground.probe.labels),
        "unreadable": list(pipeline.names_of(unreadable)),
        "concept_source": config.score.concepts,
        "groups": groups,
        "frozen": frozen,
    }
