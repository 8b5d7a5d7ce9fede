"""IoU of each filter's binarised activations with concept masks, counted in int64."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from secateur.data.concept_masks import UNLABELLED
from secateur.runtime.device import CPU

VALUES_AT_A_TIME = 2**19
"""Positions that are counted at once, few enough to stay in the processor's cache."""


@dataclass(frozen=True, eq=False)
class Overlap:
    """Intersection and union of binarised feature maps with regions, image by image.

    Areas are in positions, or in the fractions of a position that the regions were counted in.
    """

    intersection: Int[Tensor, "image filter region"]
    union: Int[Tensor, "image filter region"]

    @property
    def iou(self) -> Float[Tensor, "image filter region"]:
        """Intersection over union; 0 if both are empty."""
        return self.intersection.double() / self.union.clamp_min(1)


def binarise(
    maps: Float[Tensor, "image filter h w"], thresholds: Float[Tensor, "filter"]
) -> Bool[Tensor, "image filter h w"]:
    """Return where each filter is strictly above its threshold."""
    return maps > thresholds[:, None, None]


def overlap(
    active: Bool[Tensor, "image filter h w"],
    masks: Bool[Tensor, "image region h w"] | UInt8[Tensor, "image region h w"],
    cell: int = 1,
) -> Overlap:
    """Return the overlap of each filter's active positions with each region.

    Masks are booleans, or how much of each position is inside, out of `cell`.
    """
    exact = torch.float32 if cell * active.shape[2:].numel() <= 2**24 else torch.float64
    inside = masks.flatten(2).to(exact)
    # A last column of whole cells gives the sizes of the active areas.
    whole = torch.full_like(inside[:, :1], cell)
    columns = torch.cat([inside, whole], 1).transpose(1, 2)
    at_a_time = max(1, VALUES_AT_A_TIME // max(1, active[:1].numel()))
    counts = torch.cat(
        [
            maps.flatten(2).to(exact) @ regions
            for maps, regions in zip(active.split(at_a_time), columns.split(at_a_time), strict=True)
        ]
    ).long()
    intersection = counts[:, :, :-1]
    sizes = counts[:, :, -1:] + inside.sum(2).long()[:, None, :]
    return Overlap(intersection, sizes - intersection)


class IoUAccumulator:
    """Dataset-wide IoU of each filter with each concept (Bau et al., CVPR 2017, eq. 1).

    A filter's activations count towards a concept's union only in images that show the concept,
    as in Network Dissection.
    """

    def __init__(self, filters: int, concepts: int, device: torch.device = CPU) -> None:
        self.intersection: Tensor = torch.zeros(filters, concepts, dtype=torch.int64, device=device)
        self.union: Tensor = torch.zeros_like(self.intersection)

    def update(self, batch: Overlap, concepts: Int[Tensor, "image region"]) -> None:
        """Add a batch; `concepts` says which concept each region shows, or is `UNLABELLED`."""
        is_labelled = concepts.flatten() != UNLABELLED
        indices = concepts.flatten()[is_labelled]
        for total, counts in (
            (self.intersection, batch.intersection),
            (self.union, batch.union),
        ):
            total.index_add_(1, indices, counts.movedim(1, 0).flatten(1)[:, is_labelled])

    def state(self) -> Iterable[Tensor]:
        """Return the sums over images: add those of several processes to merge them."""
        return (self.intersection, self.union)

    def compute(self) -> Float[Tensor, "filter concept"]:
        """Return the IoU in float64, on the CPU; 0 if a concept never occurred."""
        return self.intersection.cpu().double() / self.union.cpu().clamp_min(1)
