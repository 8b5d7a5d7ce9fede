"""How well each filter's activations lie on a concept: int64 tallies, IoU and response."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Overlap:
    """Positions in common of binarised feature maps and regions, image by image."""

    intersection: Int[Tensor, "image filter region"]
    union: Int[Tensor, "image filter region"]

    @property
    def iou(self) -> Float[Tensor, "image filter region"]:
        """Intersection over union; 0 where both are empty."""
        return self.intersection.double() / self.union.clamp_min(1)


def binarise(
    maps: Float[Tensor, "image filter h w"], thresholds: Float[Tensor, "filter"]
) -> Bool[Tensor, "image filter h w"]:
    """Where each filter is strictly above its threshold."""
    return maps > thresholds[:, None, None]


def overlap(
    active: Bool[Tensor, "image filter h w"], masks: Bool[Tensor, "image region h w"]
) -> Overlap:
    """Positions where a filter is active, against each region."""
    positions = active.flatten(2).float()
    inside = masks.flatten(2).float()
    # Exact: a map has fewer than 2^24 positions.
    intersection = (positions @ inside.transpose(1, 2)).long()
    sizes = positions.sum(2).long()[:, :, None] + inside.sum(2).long()[:, None, :]
    return Overlap(intersection, sizes - intersection)
