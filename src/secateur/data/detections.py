"""What a detector finds in an image, and how it is read from the detector's output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Detections:
    """The objects that a detector finds in one image, in pixels of its input."""

    boxes: Float[Tensor, "object 4"]
    """Left, top, right and bottom."""
    scores: Float[Tensor, "object"]
    classes: Int[Tensor, "object"]
    """Class numbers, from 0 on; one of -1 counts for nothing."""
    masks: Bool[Tensor, "object height width"] | None = None
    """Over the whole input."""
    keypoints: Float[Tensor, "object keypoint 3"] | None = None
    """x, y and a score."""

    def take(self, chosen: Tensor) -> Detections:
        """Return the objects at an index or where a mask is true."""
        masks, keypoints = self.masks, self.keypoints
        return Detections(
            self.boxes[chosen],
            self.scores[chosen],
            self.classes[chosen],
            None if masks is None else masks[chosen],
            None if keypoints is None else keypoints[chosen],
        )


Decoder = Callable[[object, tuple[int, int]], list[Detections]]
"""Makes of a detector's output, for inputs of a height and width, what it finds in each image."""


def non_maximum_suppression(
    boxes: Float[Tensor, "position 4"],
    scores: Float[Tensor, "position class"],
    *,
    threshold: float,
    iou: float,
) -> Detections:
    """Return the boxes that no better one of their class overlaps by more than `iou`, best first.

    `boxes` are left, top, right and bottom. A position counts once for each class whose score is
    above the threshold.
    """
    from torchvision.ops import batched_nms  # loads its operations

    positions, classes = (scores > threshold).nonzero(as_tuple=True)
    detections = Detections(boxes[positions], scores[positions, classes], classes)
    kept: Tensor = batched_nms(detections.boxes, detections.scores, detections.classes, iou)
    return detections.take(kept)


def grid_of(
    size: tuple[int, int], strides: tuple[int, ...], device: torch.device
) -> tuple[Float[Tensor, "position 2"], Float[Tensor, "position 1"]]:
    """Return column and row of every cell of a pyramid's maps, and each one's side in pixels.

    `size` is the input's height and width. Levels follow each other, each row by row.
    """
    cells, sides = [], []
    for stride in strides:
        rows, columns = (torch.arange(-(-side // stride), device=device) for side in size)
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        cells.append(torch.stack([x, y], dim=-1).flatten(0, 1).float())
        sides.append(torch.full((x.numel(), 1), float(stride), device=device))
    return torch.cat(cells), torch.cat(sides)
