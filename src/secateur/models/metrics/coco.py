"""Average precision as COCO defines it, computed by pycocotools.

AP is the mean over classes and over the IoU thresholds 0.5, 0.55 … 0.95 of the area under precision
and recall (Lin et al., 2014; cocodataset.org). Keypoints are compared by their similarity (OKS).
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torchvision.transforms import v2

from secateur.data.detections import Detections
from secateur.data.objects import Objects
from secateur.models.metrics.requirements import require
from secateur.runtime.errors import DataError, UsageError

Shape = Literal["box", "mask", "keypoint"]
"""What objects are matched by."""
IOU_TYPES: dict[Shape, str] = {"box": "bbox", "mask": "segm", "keypoint": "keypoints"}
"""Names that pycocotools has for them."""
SIZES = ("small", "medium", "large")
"""Up to 32², up to 96² and above 96² square pixels of the stored image."""


@dataclass(frozen=True, eq=False)
class ImageObjects:
    """The objects of one image, wanted and found, as COCO writes them."""

    index: int
    """Number of the image in its list."""
    size: tuple[int, int]
    """Height and width of the stored image."""
    wanted: list[dict[str, Any]]
    detections: list[dict[str, Any]]


def image_objects(
    index: int, wanted: Objects, detections: Detections, input_size: tuple[int, int], shape: Shape
) -> ImageObjects:
    """Return an image's objects in pixels of the stored image.

    Raises `DataError` or `UsageError` if masks or keypoints are missing.
    """
    if shape == "mask" and wanted.segments is None:
        raise DataError("mask AP needs segments of the objects, and the data has boxes only")
    if shape == "keypoint" and wanted.keypoints is None:
        raise DataError("keypoint AP needs keypoints of the objects, and the data has none")
    if (
        len(detections.boxes)
        and getattr(detections, f"{shape}s" if shape != "box" else "boxes") is None
    ):
        raise UsageError(f"{shape} AP needs {shape}s, and the network's decoder returns none")
    return ImageObjects(
        index,
        wanted.size,
        _wanted(wanted, shape),
        _found(detections.take(detections.classes >= 0), wanted, input_size, shape),
    )


def as_objects(detections: Detections, size: tuple[int, int], threshold: float) -> Objects:
    """Return what a network finds, with scores above a threshold, as objects to be found."""
    detections = detections.take(detections.scores > threshold)
    boxes = detections.boxes.cpu().double()
    masks = None if detections.masks is None else detections.masks.cpu()
    keypoints = detections.keypoints
    if keypoints is not None:
        keypoints = torch.cat([keypoints[..., :2], torch.full_like(keypoints[..., :1], 2)], dim=2)
        keypoints = keypoints.cpu().double()
    return Objects(
        boxes=boxes,
        classes=detections.classes.cpu(),
        is_crowd=torch.zeros(len(boxes), dtype=torch.bool),
        areas=_areas(boxes) if masks is None else masks.flatten(1).sum(1).double(),
        size=size,
        keypoints=keypoints,
        segments=None if masks is None else tuple(map(_encode, masks)),
    )


class Evaluation:
    """Average precision over images, for one way to match objects."""

    def __init__(self, images: Sequence[ImageObjects], shape: Shape) -> None:
        self._tools: Any = require("pycocotools.cocoeval", f"{shape} AP")
        coco: Any = require("pycocotools.coco", f"{shape} AP")
        self._evaluation = self._evaluate(coco.COCO, images, shape)
        self._by_image = np.array(self._evaluation.evalImgs, dtype=object).reshape(
            len(self.classes), -1, len(images)
        )  # [class, size, image]

    @property
    def classes(self) -> list[int]:
        """Classes that images show."""
        return list(self._evaluation.params.catIds)

    def _evaluate(self, coco: Any, images: Sequence[ImageObjects], shape: Shape) -> Any:
        wanted = [row | {"image_id": n} for n, image in enumerate(images) for row in image.wanted]
        detections = [
            row | {"image_id": n} for n, image in enumerate(images) for row in image.detections
        ]
        classes = sorted({row["category_id"] for row in wanted})
        if not classes:
            raise DataError(f"{shape} AP needs objects, and no image shows any")
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints what it does
            parts = []
            for annotations in (wanted, detections):
                part = coco()
                part.dataset = {
                    "images": [
                        {"id": n, "height": image.size[0], "width": image.size[1]}
                        for n, image in enumerate(images)
                    ],
                    "annotations": [row | {"id": n} for n, row in enumerate(annotations, 1)],
                    "categories": [{"id": number} for number in classes],
                }
                part.createIndex()
                parts.append(part)
            evaluation = self._tools.COCOeval(*parts, IOU_TYPES[shape])
            if shape == "keypoint":
                points = len(wanted[0]["keypoints"]) // 3
                if points != len(evaluation.params.kpt_oks_sigmas):  # those of COCO's people
                    evaluation.params.kpt_oks_sigmas = np.full(points, 1 / points)
            evaluation.evaluate()
            evaluation.accumulate()
        return evaluation

    def figures(self, class_names: Sequence[str] = ()) -> dict[str, float]:
        """Return AP, AP50, AP75, AP by size and AP by class; those without objects are left out."""
        precision = self._evaluation.eval["precision"]  # [iou, recall, class, size, most found]
        labels = self._evaluation.params.areaRngLbl
        everything = precision[:, :, :, 0, -1]
        figures = {
            "AP": _mean(everything),
            "AP50": _mean(everything[0]),
            "AP75": _mean(everything[5]),
        }
        for size in SIZES:
            if size in labels:
                figures[f"AP {size}"] = _mean(precision[:, :, :, labels.index(size), -1])
        for place, number in enumerate(self.classes):
            name = class_names[number] if number < len(class_names) else str(number)
            figures[f"AP {name}"] = _mean(everything[:, :, place])
        return {name: value for name, value in figures.items() if value is not None}

    def resampled(self, images: Int[Tensor, "image"]) -> dict[str, float]:
        """Return AP, AP50, AP75 and AP by class of some of the images, by their places.

        An image counts as often as its place is given.

        For intervals by bootstrap: with all images' places drawn with replacement.
        """
        part = copy.copy(self)
        part._evaluation = copy.copy(self._evaluation)
        settings = copy.copy(self._evaluation.params)
        settings.imgIds = list(range(len(images)))
        # What is not asked for here takes most of the time: objects by size, and fewer boxes.
        settings.areaRng, settings.areaRngLbl = settings.areaRng[:1], settings.areaRngLbl[:1]
        settings.maxDets = settings.maxDets[-1:]
        vars(part._evaluation).update(
            params=settings,
            _paramsEval=settings,
            evalImgs=list(self._by_image[:, :1, images.numpy()].reshape(-1)),
        )
        with contextlib.redirect_stdout(io.StringIO()):
            part._evaluation.accumulate()
        return part.figures()

    def f1(self, threshold: float) -> float:
        """Return the F1 of the objects found with at least this score, at an IoU of 0.5."""
        right = wanted = detections = 0
        for image in self._by_image[:, 0].reshape(-1):  # of all sizes
            if image is None:
                continue
            counts = np.asarray(image["dtScores"]) >= threshold
            counts &= ~image["dtIgnore"][0]
            right += int((image["dtMatches"][0] > 0)[counts].sum())
            detections += int(counts.sum())
            wanted += int((1 - np.asarray(image["gtIgnore"])).sum())
        return 2 * right / (wanted + detections) if wanted + detections else 1.0


def _mean(precision: Any) -> float | None:
    """Return the mean of what is known; None if nothing is."""
    known = precision[precision > -1]
    return float(known.mean()) if known.size else None


def _wanted(objects: Objects, shape: Shape) -> list[dict[str, Any]]:
    rows = []
    for number, box in enumerate(objects.boxes.tolist()):
        row: dict[str, Any] = {
            "category_id": int(objects.classes[number]),
            "bbox": _corner_and_sides(box),
            "area": float(objects.areas[number]),
            "iscrowd": int(objects.is_crowd[number]),
        }
        if shape == "mask":
            assert objects.segments is not None
            segment = objects.segments[number]
            if segment is None:
                raise DataError("mask AP needs a segment of every object")
            row["segmentation"] = segment
        if shape == "keypoint":
            assert objects.keypoints is not None
            points = objects.keypoints[number]
            row["keypoints"] = points.flatten().tolist()
            row["num_keypoints"] = int((points[:, 2] > 0).sum())
        rows.append(row)
    return rows


def _found(
    detections: Detections, wanted: Objects, input_size: tuple[int, int], shape: Shape
) -> list[dict[str, Any]]:
    geometry = wanted.geometry
    corners = geometry.to_stored(detections.boxes.cpu().double().reshape(-1, 2, 2)).flatten(1)
    areas = _areas(corners)
    rows: list[dict[str, Any]] = [
        {
            "category_id": number,
            "score": score,
            "bbox": _corner_and_sides(box),
            "area": area,
            "iscrowd": 0,
        }
        for number, score, box, area in zip(
            detections.classes.tolist(),
            detections.scores.double().tolist(),
            corners.tolist(),
            areas.tolist(),
            strict=True,
        )
    ]
    if shape == "mask" and rows:
        assert detections.masks is not None
        for row, mask in zip(
            rows, _stored_masks(detections.masks, wanted, input_size), strict=True
        ):
            row["segmentation"], row["area"] = _encode(mask), int(mask.sum())
    if shape == "keypoint" and rows:
        assert detections.keypoints is not None
        points = geometry.to_stored(detections.keypoints[..., :2].cpu().double())
        sides = points.amax(1) - points.amin(1)
        ones = torch.ones_like(points[..., :1])
        flat = torch.cat([points, ones], dim=2).flatten(1).tolist()
        for row, values, area in zip(rows, flat, sides.prod(1).tolist(), strict=True):
            row["keypoints"], row["area"] = values, area
    return rows


def _stored_masks(masks: Tensor, wanted: Objects, input_size: tuple[int, int]) -> Tensor:
    """Return masks of the input as masks of the stored image."""
    height, width = wanted.size
    corners = torch.tensor([[0.0, 0.0], [width, height]])
    (left, top), (right, bottom) = wanted.geometry.to_input(corners).round().int().tolist()
    rows, columns = max(1, bottom - top), max(1, right - left)
    if masks.shape[1:] != input_size:
        raise UsageError(
            f"masks of detections must have the input's size, {input_size[0]}×{input_size[1]}, not "
            f"{masks.shape[1]}×{masks.shape[2]}"
        )
    # A crop of the stored image leaves no mask beyond it: `crop` pads with zeros.
    inner = v2.functional.crop(masks.cpu(), top, left, rows, columns)
    stored: Tensor = v2.functional.resize(
        inner[:, None].to(torch.uint8), [height, width], v2.InterpolationMode.NEAREST
    )
    return stored[:, 0].bool()


def _encode(mask: Tensor) -> dict[str, Any]:
    """Return a mask `[height, width]` as a run-length encoding."""
    tools: Any = require("pycocotools.mask", "mask AP")
    encoded: dict[str, Any] = tools.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))
    return encoded


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _corner_and_sides(box: Sequence[float]) -> list[float]:
    left, top, right, bottom = box
    return [left, top, right - left, bottom - top]
