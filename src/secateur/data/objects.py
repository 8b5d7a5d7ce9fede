"""Annotated objects of an image: boxes, classes, segments and keypoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secateur.data.preprocessing import Geometry

Segment = list[list[float]] | Mapping[str, Any]
"""Where an object is, as COCO writes it: polygons `[[x1, y1, x2, y2, …], …]` in pixels of the
stored image, or a run-length encoding `{"size": [height, width], "counts": …}`, by columns."""


@dataclass(frozen=True, eq=False)
class Objects:
    """The objects of one image, in pixels of the stored image, from its upper left corner."""

    boxes: Float[Tensor, "object 4"]
    """Left, top, right and bottom."""
    classes: Int[Tensor, "object"]
    """Class numbers, from 0 on."""
    is_crowd: Bool[Tensor, "object"]
    """Whether a box is around several objects that count as none."""
    areas: Float[Tensor, "object"]
    """In square pixels of the stored image."""
    size: tuple[int, int]
    """Height and width of the stored image."""
    keypoints: Float[Tensor, "object keypoint 3"] | None = None
    """x, y and 0 (not labelled), 1 (hidden) or 2 (visible)."""
    segments: tuple[Segment | None, ...] | None = None
    """One for each object; None for objects without."""
    geometry: Geometry = field(default_factory=Geometry)
    """Where the stored image lies in the network's input."""

    def at_size(self, size: tuple[int, int]) -> Objects:
        """Return the same objects in an image that is stored at another height and width."""
        y, x = size[0] / self.size[0], size[1] / self.size[1]
        keypoints = self.keypoints
        if keypoints is not None:
            keypoints = keypoints * keypoints.new_tensor((x, y, 1))
        segments = self.segments
        if segments is not None:
            segments = tuple(_scaled(segment, x, y) for segment in segments)
        return replace(
            self,
            boxes=self.boxes * self.boxes.new_tensor((x, y, x, y)),
            areas=self.areas * (x * y),
            keypoints=keypoints,
            segments=segments,
            size=size,
        )

    def to(self, device: torch.device) -> Objects:
        """Return the same objects with their tensors on a device."""
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def boxes_in_input(self) -> Float[Tensor, "object 4"]:
        """Return the boxes in pixels of the network's input."""
        corners = self.geometry.to_input(self.boxes.reshape(-1, 2, 2))
        return torch.cat([corners.amin(1), corners.amax(1)], dim=1)  # a flip swaps the sides


def _scaled(segment: Segment | None, x: float, y: float) -> Segment | None:
    """Return polygons with their columns and rows multiplied."""
    if segment is None or isinstance(segment, Mapping):
        return segment
    return [[value * (x, y)[place % 2] for place, value in enumerate(part)] for part in segment]
