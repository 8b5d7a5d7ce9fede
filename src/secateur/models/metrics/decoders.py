"""Decoders by kind of detector: which boxes a network's output means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.data.detections import Decoder, Detections
from secateur.models import user_code
from secateur.runtime.errors import UsageError

MASK_THRESHOLD = 0.5
"""Above which a pixel belongs to a mask of torchvision's Mask R-CNN."""


class TorchvisionDecoder:
    """Decodes what torchvision's detectors return: a list of boxes, labels and scores by name.

    Their classes count from 1, and those of COCO leave numbers out. `categories` are the names of
    the network's outputs, as `weights.meta["categories"]`: the classes are then numbered without
    `__background__` and `N/A`.
    """

    def __init__(self, categories: Sequence[str] | None = None) -> None:
        self._numbers: Tensor | None = None
        if categories is not None:
            is_class = torch.tensor([n not in ("__background__", "N/A") for n in categories])
            self._numbers = torch.where(is_class, is_class.cumsum(0) - 1, -1)

    def __call__(self, output: object, size: tuple[int, int]) -> list[Detections]:
        """Return the detections of each image; see `Decoder`."""
        del size
        if not isinstance(output, list) or not all(
            isinstance(image, Mapping) and {"boxes", "labels", "scores"} <= image.keys()
            for image in output
        ):
            raise UsageError(
                "torchvision's detectors return a list of boxes, labels and scores; this network "
                "does not"
            )
        return [self._detections(image) for image in output]

    def _detections(self, image: Mapping[str, Tensor]) -> Detections:
        labels = image["labels"].cpu()
        masks, keypoints = image.get("masks"), image.get("keypoints")
        return Detections(
            image["boxes"],
            image["scores"],
            (labels - 1 if self._numbers is None else self._numbers[labels]).to(
                image["boxes"].device
            ),
            None if masks is None else masks[:, 0] > MASK_THRESHOLD,
            keypoints,
        )


def user_decoder(name: str) -> Decoder:
    """Return the decoder `path/to/file.py:function` of the user's.

    Raises `UsageError` when the file can't be run, and where the function returns no detections.
    """
    function = user_code.find(name, "decoder")

    def decode(output: object, size: tuple[int, int]) -> list[Detections]:
        detections: Any = user_code.call(name, function, output=output, size=size)
        if isinstance(detections, Sequence):
            detections = list(map(_as_detections, detections))
        if not isinstance(detections, list) or not all(
            isinstance(one, Detections) for one in detections
        ):
            raise UsageError(
                f"{name} must return for each image its boxes, scores and classes; it returns "
                f"{type(detections).__name__}"
            )
        return detections

    return decode


def _as_detections(detections: object) -> object:
    """Return what a user's function found in an image: a mapping or a tuple is taken apart."""
    if isinstance(detections, Mapping) and {"boxes", "scores", "classes"} <= detections.keys():
        return Detections(
            detections["boxes"],
            detections["scores"],
            detections["classes"],
            detections.get("masks"),
            detections.get("keypoints"),
        )
    if isinstance(detections, tuple) and 3 <= len(detections) <= 5:
        return Detections(*detections)
    return detections
