"""The report's gallery: for each filter the images with its strongest responses, and concepts."""

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

from secateur.data import DataSet
from secateur.data.annotated import AnnotatedImages
from secateur.graph.dependency import DependencyGraph
from secateur.graph.forward import inputs_of
from secateur.graph.taps import as_maps
from secateur.pipeline.dissect import dissect_network
from secateur.pipeline.name_filters import image_words_of
from secateur.pipeline.result import RunResult
from secateur.pipeline.run_context import RunContext
from secateur.pipeline.scoring_context import (
    ScoringContext,
    context_class_names,
    make_scoring_context,
)
from secateur.runtime.packed_inputs import Inputs
from secateur.runtime.progress import ProgressCallback, no_progress
from secateur.scoring.dissection import FilterConcept
from secateur.scoring.naming import FilterName

SIDE = 112
"""Largest side of an image in the page, in pixels."""
JPEG_QUALITY = 80
MAX_GRID = 56
"""Most rows and columns of the grid that regions are stored on."""
MAX_CONCEPTS = 3
MIN_IOU = 0.005
"""Concepts with a lower IoU are not listed with a filter."""


@dataclass(frozen=True)
class LayerGallery:
    """Top images and concepts of the filters of one channel group."""

    name: str
    concepts: tuple[tuple[FilterConcept, ...], ...]
    """For each filter the concepts with the highest IoU, the highest first."""
    after: tuple[FilterConcept | None, ...]
    """For each filter its best concept in the pruned network; None if the filter was removed."""
    names: tuple[FilterName | None, ...]
    """For each filter the word that names it; empty if filters are not named."""
    images: tuple[tuple[int, ...], ...]
    """For each filter its top images, as indices of `Gallery.images`."""
    grid: tuple[int, int]
    """Rows and columns of a region."""
    regions: bytes
    """One bit a cell, `[filter, image, cell]`, each image padded to whole bytes."""


@dataclass(frozen=True)
class Gallery:
    """Top images and concepts of a network's filters, before and after pruning."""

    calibration_images: int
    """Number of images that the filters were measured on."""
    quantile: float
    """Fraction of positions that are above a filter's threshold."""
    images: tuple[bytes, ...]
    """JPEG."""
    image_classes: tuple[str, ...]
    """Class name of each image; empty if it has none."""
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
    """Measure what the filters of a network respond to, before and after a run.

    Args:
        model: The network before the run.
        smaller: The network after the run.
        dataset: The data of the run.
        result: The result of the run; its configuration says which images and concepts to use.
        progress: Shows how far the passes are.
        dependencies: The dependency graph of `model`, if known.

    Returns:
        None if the configuration asks for no images. All processes of a run get the same.

    Raises:
        SecateurError: The images can't be read, or the network can't be traced.
    """
    config = result.config
    if not config.report.images:
        return None
    count = min(config.report.images, config.data.calibration_images)
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"calibration_images": count})}
    )
    run_context = RunContext(progress).collecting_unreadable(config)
    context = make_scoring_context(model, dataset, config, run_context, dependencies=dependencies)
    before = dissect_network(
        model,
        context,
        config,
        images=config.report.top_images,
        image_words=image_words_of(config, context, dataset),
    )
    context_after = make_scoring_context(smaller, dataset, config, run_context)
    title = "dissecting the pruned network"
    after = dissect_network(smaller, context_after, config, images=1, title=title)
    tops = {name: before.top(group) for name, group in context.dependencies.groups.items()}
    indices = [top.indices.flatten() for top in tops.values()]
    shown = torch.cat([torch.zeros(0).long(), *indices]).unique()
    place = {index: place for place, index in enumerate(shown.tolist())}
    removed = {group.name: group.removed for group in result.groups}
    layers = []
    for name, group in context.dependencies.groups.items():
        iou = before.dissection.iou_by_channel(group)
        best: list[FilterConcept | None] = [None] * len(group)
        group_after = context_after.dependencies.groups.get(name)
        if group_after is not None:
            kept = [number for number in range(len(group)) if number not in set(removed[name])]
            for number, concept in zip(kept, after.concepts(group_after), strict=True):
                best[number] = concept
        top = tops[name]
        grid, regions = _pack(top.regions)
        layers.append(
            LayerGallery(
                name=name,
                concepts=_most_overlapped(
                    iou, [concept.name for concept in context.source.concepts]
                ),
                after=tuple(best),
                names=tuple(before.names.get(name, ())),
                images=tuple(tuple(place[index] for index in row) for row in top.indices.tolist()),
                grid=grid,
                regions=regions,
            )
        )
    return Gallery(
        calibration_images=len(context.calibration.labels),
        quantile=config.score.quantile,
        images=_thumbnails(context, shown, config.data.batch_size, inputs_of(model)),
        image_classes=_class_names(context, shown, dataset),
        layers=tuple(layers),
    )


def _most_overlapped(iou: Tensor, names: Sequence[str]) -> tuple[tuple[FilterConcept, ...], ...]:
    values, order = iou.topk(min(MAX_CONCEPTS, iou.shape[1]), dim=1)
    return tuple(
        tuple(
            FilterConcept(names[concept], value)
            for concept, value in zip(concepts, row, strict=True)
            if value >= MIN_IOU
        )
        for concepts, row in zip(order.tolist(), values.tolist(), strict=True)
    )


def _pack(regions: Bool[Tensor, "filter image h w"]) -> tuple[tuple[int, int], bytes]:
    """Return the grid and one bit a cell; a coarser cell is active if any cell in it is."""
    height, width = regions.shape[2:]
    factor = -(-max(height, width) // MAX_GRID)
    if factor > 1:
        regions = F.max_pool2d(regions.float(), factor, ceil_mode=True) > 0
    grid = (int(regions.shape[2]), int(regions.shape[3]))
    return grid, np.packbits(regions.flatten(2).numpy(), axis=-1).tobytes()


def _thumbnails(
    context: ScoringContext, shown: Tensor, batch_size: int, inputs: Inputs | None
) -> tuple[bytes, ...]:
    """Return the images as JPEG, after the network's preprocessing; of several inputs one."""
    thumbnails: list[bytes] = []
    for indices in shown.split(batch_size):
        images = context.calibration.read(indices, context.reader.preprocessing)
        images = images if inputs is None else inputs.picture(images)
        thumbnails += [_jpeg(_visible(pixels)) for pixels in images]
    return tuple(thumbnails)


def _visible(pixels: Num[Tensor, "channel *position"]) -> UInt8[Tensor, "rgb height width"]:
    """Return pixels as 8-bit RGB.

    Floats are stretched to the full range, and images without three channels become the grey mean
    of their channels. A signal is a column.
    """
    pixels = as_maps(pixels[None])[0]
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


def _class_names(context: ScoringContext, shown: Tensor, dataset: DataSet) -> tuple[str, ...]:
    """Return the class name of each image.

    It is empty for images that came with the concepts, have no label, or have no one class.
    """
    images, kind = context.calibration, context.task.kind
    has_classes = kind in ("single-label", "binary") and not isinstance(images, AnnotatedImages)
    names: tuple[str, ...] = ()
    if has_classes and dataset.has_labels:
        names = context_class_names(dataset, context.task, context.dependencies)
    labels = images.labels[shown].tolist()
    return tuple(names[label] if 0 <= label < len(names) else "" for label in labels)


def to_json(result: RunResult, gallery: Gallery | None) -> dict[str, Any]:
    """Return the data of the page's script, with concepts and images by index to keep it small."""
    galleries = {layer.name: layer for layer in gallery.layers} if gallery else {}
    concepts: dict[str, int] = {}

    def encode(overlap: FilterConcept) -> tuple[int, float]:
        return concepts.setdefault(overlap.concept, len(concepts)), round(overlap.iou, 4)

    layers = []
    for group in result.groups:
        fields: dict[str, Any] = {
            "name": group.name,
            "scores": [float(f"{score:.5g}") for score in group.scores],
            "removed": list(group.removed),
        }
        layer = galleries.get(group.name)
        if layer is not None:
            fields |= {
                "concepts": [[encode(overlap) for overlap in row] for row in layer.concepts],
                "after": [None if best is None else encode(best) for best in layer.after],
                "names": [one and (one.word, round(one.similarity, 4)) for one in layer.names],
                "images": layer.images,
                "grid": layer.grid,
                "regions": base64.b64encode(layer.regions).decode(),
            }
        layers.append(fields)
    images = gallery.images if gallery else ()
    return {
        "criterion": result.config.score.criterion,
        "layers": layers,
        "concepts": list(concepts),
        "images": [base64.b64encode(image).decode() for image in images],
        "classes": gallery.image_classes if gallery else (),
    }
