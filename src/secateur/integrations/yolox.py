"""YOLOX's detectors (Ge et al., 2021, arXiv 2107.08430), from the package `pixeltable-yolox`.

`yolox:NAME` builds `yolox_nano`, `yolox_tiny`, `yolox_s`, `yolox_m`, `yolox_l` or `yolox_x`. The
network returns `[image, position, 5 + class]`: the box's centre and the logarithm of its sides in
cells, then objectness and the classes' scores, both behind a sigmoid. `decode` makes boxes of it.

Package and published weights are under the Apache License 2.0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from secateur.data.detections import Decoder, Detections, grid_of, non_maximum_suppression
from secateur.data.preprocessing import Preprocessing
from secateur.graph.output_values import OutputPart
from secateur.runtime.errors import UnknownName, UsageError

PREFIX = "yolox"
NAMES = ("yolox_nano", "yolox_tiny", "yolox_s", "yolox_m", "yolox_l", "yolox_x")
STRIDES = (8, 16, 32)
"""Sides of the cells of the three levels, in pixels."""
SCORE_THRESHOLD, IOU = 0.01, 0.65
"""Of the boxes that are kept, and of those that count as the same, as YOLOX is evaluated."""

BOX_WEIGHT, CLASS_WEIGHT = 5.0, 3.0
"""Of errors of boxes and classes, beside those of objectness. Chosen by the agreement with the
original's boxes on train images of COCO that were held out (docs/how_to/detection.md)."""
OUTPUT_PARTS = (
    OutputPart(dim=2, start=0, stop=4, times=4, weight=BOX_WEIGHT),
    OutputPart(dim=2, start=4, stop=5, transform="probabilities"),
    OutputPart(dim=2, start=5, transform="probabilities", times=4, weight=CLASS_WEIGHT),
)
"""What is compared: objectness, and boxes and classes where there are objects."""


def build(name: str, *, num_classes: int | None = None) -> nn.Module:
    """Return the named detector with random weights, in evaluation mode.

    Raises `UnknownName`, or `UsageError` if the package is not installed.
    """
    settings = _settings(name)
    if num_classes is not None:
        settings.num_classes = num_classes
    model: nn.Module = settings.get_model()
    head: Any = model.head
    model.__class__ = _returning_outputs(type(model))
    head.__class__ = _returning_outputs(type(head))
    head.decode_in_inference = False  # boxes in cells: `decode` makes pixels of them
    return model.eval()


def _returning_outputs(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class of a module that returns its outputs in training, too, not YOLOX's loss.

    YOLOX asks for boxes in training mode. Its layers are trained all the same: here to return what
    the original network does.
    """

    class ReturningOutputs(kind):  # type: ignore[misc, valid-type]
        def train(self, mode: bool = True) -> nn.Module:
            super().train(mode)
            self.training = False
            return self

    ReturningOutputs.__name__, ReturningOutputs.__qualname__ = kind.__name__, kind.__qualname__
    ReturningOutputs.__module__ = kind.__module__
    return ReturningOutputs


def preprocessing(name: str) -> Preprocessing:
    """Return what the named detector expects: values from 0 to 255, blue first, at the top left."""
    height, width = _settings(name).test_size
    return Preprocessing(
        (height, width) if height != width else height,
        min(height, width),
        (0.0, 0.0, 0.0),
        (1.0, 1.0, 1.0),
        fit="letterbox",
        pad_at="top-left",
        channel_order="bgr",
        value_range=255,
    )


def decoder(model: nn.Module) -> Decoder:
    """Return what makes boxes of the network's output."""
    del model
    return decode


def decode(output: object, size: tuple[int, int]) -> list[Detections]:
    """Return what the network finds in each image, from its output; see `Decoder`."""
    if not isinstance(output, Tensor) or output.ndim != 3 or output.shape[2] < 6:
        raise UsageError("YOLOX returns [image, position, 5 + class]; this network does not")
    cells, sides = grid_of(size, STRIDES, output.device)
    if output.shape[1] != len(cells):
        raise UsageError(
            f"YOLOX returns {len(cells)} positions for images of {size[0]}×{size[1]}; this network "
            f"returns {output.shape[1]}"
        )
    detections = []
    for image in output.float():
        centres, halves = (image[:, :2] + cells) * sides, image[:, 2:4].exp() * sides / 2
        boxes = torch.cat([centres - halves, centres + halves], dim=1)
        scores = image[:, 4:5] * image[:, 5:]
        detections.append(
            non_maximum_suppression(boxes, scores, threshold=SCORE_THRESHOLD, iou=IOU)
        )
    return detections


def _settings(name: str) -> Any:
    """Return YOLOX's configuration of a detector."""
    if name not in NAMES:
        raise UnknownName("YOLOX model", name, NAMES)
    try:
        from yolox.config import YoloxConfig
    except ImportError as error:
        raise UsageError(
            f"yolox: networks need the extra: pip install 'secateur[yolox]' ({error})"
        ) from error
    return YoloxConfig.get_named_config(name)
