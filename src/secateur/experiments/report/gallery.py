"""What a report shows of each filter: the images that it responds to most, and its concepts."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Num, UInt8
from PIL import Image
from torch import Tensor, nn

from secateur.data import DataSet, Images
from secateur.data.annotated import AnnotatedImages
from secateur.graph.dependency import DependencyGraph
from secateur.pipeline.dissect import VOTES, dissect_network
from secateur.pipeline.result import RunResult
from secateur.pipeline.run_context import RunContext
from secateur.pipeline.scoring_context import ScoringContext, make_scoring_context
from secateur.runtime.progress import ProgressCallback, no_progress
from secateur.scoring.dissection import FilterConcept

SIDE = 112
"""Largest side of an image in the page, in pixels."""
JPEG_QUALITY = 80
FINEST = 56
"""Regions are kept on a grid of at most so many rows and columns."""
CONCEPTS_SHOWN = 3
LEAST_IOU = 0.005
"""Concepts that a filter overlaps less are not listed with it."""


@dataclass(frozen=True)
class LayerGallery:
    """What the filters of one group see."""

    name: str
    concepts: tuple[tuple[FilterConcept, ...], ...]
    """Of each filter those that it overlaps most, the best first."""
    after: tuple[FilterConcept | None, ...]
    """The best concept of each filter that stayed, in the pruned network."""
    votes: tuple[float, ...]
    """By `sights.VOTES`."""
    images: tuple[tuple[int, ...], ...]
    """Of each filter its top images, as places in `Gallery.images`."""
    grid: tuple[int, int]
    """Rows and columns of the regions."""
    regions: bytes
    """A bit a cell, `[filter, place, cell]`, each place filled up to whole bytes."""


@dataclass(frozen=True)
class Gallery:
    """What the filters of a network see, before the cut and after it."""

    calibration_images: int
    """How many images they were looked at with."""
    quantile: float
    """Share of positions at which each filter is active."""
    images: tuple[bytes, ...]
    """JPEG."""
    image_classes: tuple[str, ...]
    """What the data calls each image, or nothing."""
    layers: tuple[LayerGallery, ...]


def make_gallery(
    model: nn.Module,
    smaller: nn.Module,
    dataset: DataSet,
    result: RunResult,
    progress: ProgressCallback = no_progress,
    *,
    dependencies: DependencyGraph | None = None,
) -> Gallery | None:
    """Looks at the network before and after a run, as the run's configuration says.

    `dependencies` is that of the network before, where it is known.

    None where that asks for no images. Of several processes each gets the same. Raises
    `SecateurError`.
    """
    config = result.config
    if not config.report.images:
        return None
    few = min(config.report.images, config.data.calibration_images)
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"calibration_images": few})}
    )
    run_context = RunContext(progress).collecting_unreadable(config)
    context = make_scoring_context(model, dataset, config, run_context, dependencies=dependencies)
    count = config.report.top_images
    sights = dissect_network(model, context, config, (VOTES,), images=count)
    later = make_scoring_context(smaller, dataset, config, run_context)
    title = "dissecting remaining filters"
    after = dissect_network(smaller, later, config, images=1, title=title)
    tops = {name: sights.top(group) for name, group in context.dependencies.groups.items()}
    numbers = [top.indices for top in tops.values()]
    wanted = torch.cat([torch.zeros(0).long(), *(each.flatten() for each in numbers)]).unique()
    place = {number: place for place, number in enumerate(wanted.tolist())}
    removed = {group.name: group.removed for group in result.groups}
    layers = []
    for name, group in context.dependencies.groups.items():
        iou = sights.dissection.iou_by_channel(group)
        best: list[FilterConcept | None] = [None] * len(group)
        group_after = later.dependencies.groups.get(name)
        if group_after is not None:
            kept = [number for number in range(len(group)) if number not in set(removed[name])]
            for number, seen in zip(kept, after.concepts(group_after), strict=True):
                best[number] = seen
        top = tops[name]
        grid, regions = _packed(top.regions)
        layers.append(
            LayerGallery(
                name=name,
                concepts=_most_overlapped(iou, [each.name for each in context.source.concepts]),
                after=tuple(best),
                votes=tuple(sights.scores[VOTES].scores[name].tolist()),
                images=tuple(tuple(place[n] for n in row) for row in top.indices.tolist()),
                grid=grid,
                regions=regions,
            )
        )
    return Gallery(
        calibration_images=len(context.calibration.labels),
        quantile=config.score.quantile,
        images=_thumbnails(context, wanted, config.data.batch_size),
        image_classes=_class_names(context.calibration, wanted, dataset),
        layers=tuple(layers),
    )


def _most_overlapped(iou: Tensor, names: Sequence[str]) -> tuple[tuple[FilterConcept, ...], ...]:
    values, order = iou.topk(min(CONCEPTS_SHOWN, iou.shape[1]), dim=1)
    return tuple(
        tuple(
            FilterConcept(names[concept], value)
            for concept, value in zip(concepts, row, strict=True)
            if value >= LEAST_IOU
        )
        for concepts, row in zip(order.tolist(), values.tolist(), strict=True)
    )


def _packed(regions: Bool[Tensor, "filter place h w"]) -> tuple[tuple[int, int], bytes]:
    """The grid, coarse enough, and a bit a cell; a cell of several is active where any is."""
    height, width = regions.shape[2:]
    factor = -(-max(height, width) // FINEST)
    if factor > 1:
        regions = F.max_pool2d(regions.float(), factor, ceil_mode=True) > 0
    grid = (int(regions.shape[2]), int(regions.shape[3]))
    return grid, np.packbits(regions.flatten(2).numpy(), axis=-1).tobytes()


def _thumbnails(context: ScoringContext, wanted: Tensor, batch_size: int) -> tuple[bytes, ...]:
    """The images as the network gets them, as JPEG."""
    thumbnails: list[bytes] = []
    for indices in wanted.split(batch_size):
        images = context.calibration.read(indices, context.reader.preprocessing)
        thumbnails += [_jpeg(_visible(pixels)) for pixels in images]
    return tuple(thumbnails)


def _visible(pixels: Num[Tensor, "channel height width"]) -> UInt8[Tensor, "rgb height width"]:
    """Floats are stretched from the least to the greatest; other than three channels are meant."""
    if pixels.is_floating_point():
        low, high = pixels.amin(), pixels.amax()
        pixels = (255 * (pixels - low) / (high - low).clamp_min(1e-12)).round().byte()
    if len(pixels) != 3:
        pixels = pixels.float().mean(0, keepdim=True).byte().expand(3, -1, -1)
    return pixels


def _jpeg(pixels: UInt8[Tensor, "rgb height width"]) -> bytes:
    picture = Image.fromarray(pixels.movedim(0, -1).contiguous().numpy())
    if max(picture.size) > SIDE:
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return file.getvalue()


def _class_names(images: Images, wanted: Tensor, dataset: DataSet) -> tuple[str, ...]:
    """Nothing where the images came with the concepts, and have no classes of the data."""
    names = () if isinstance(images, AnnotatedImages) else dataset.class_names
    labels = images.labels[wanted].tolist()
    return tuple(names[label] if 0 <= label < len(names) else "" for label in labels)


def to_json(result: RunResult, gallery: Gallery | None) -> dict[str, Any]:
    """What the page's script reads: small, with concepts and images by number."""
    by_name = {layer.name: layer for layer in gallery.layers} if gallery else {}
    concepts: dict[str, int] = {}

    def coded(seen: FilterConcept) -> tuple[int, float]:
        return concepts.setdefault(seen.concept, len(concepts)), round(seen.iou, 4)

    layers = []
    for group in result.groups:
        found: dict[str, Any] = {
            "name": group.name,
            "scores": [float(f"{score:.5g}") for score in group.scores],
            "removed": list(group.removed),
        }
        layer = by_name.get(group.name)
        if layer is not None:
            found |= {
                "concepts": [[coded(seen) for seen in row] for row in layer.concepts],
                "after": [None if seen is None else coded(seen) for seen in layer.after],
                "images": layer.images,
                "grid": layer.grid,
                "regions": base64.b64encode(layer.regions).decode(),
                "votes": [float(f"{votes:.5g}") for votes in layer.votes],
            }
        layers.append(found)
    images = gallery.images if gallery else ()
    return {
        "criterion": result.config.score.criterion,
        "layers": layers,
        "concepts": list(concepts),
        "images": [base64.b64encode(image).decode() for image in images],
        "classes": gallery.image_classes if gallery else (),
    }
