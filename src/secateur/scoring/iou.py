"""How well each filter's activations lie on a concept: overlap, counted in int64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from secateur.data.concept_masks import UNLABELLED

VALUES_AT_A_TIME = 2**19
"""So many positions are counted at once: they stay in the processor's cache."""


@dataclass(frozen=True, eq=False)
class Overlap:
    """Positions in common of binarised feature maps and regions, image by image.

    In the unit in which the regions were counted.
    """

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
    active: Bool[Tensor, "image filter h w"],
    masks: Bool[Tensor, "image region h w"] | UInt8[Tensor, "image region h w"],
    cell: int = 1,
) -> Overlap:
    """Positions where a filter is active, against each region.

    Masks may say how much of each position is inside, with `cell` for the whole of it.
    """
    exact = torch.float32 if cell * active.shape[2:].numel() <= 2**24 else torch.float64
    inside = masks.flatten(2).to(exact)
    # A last column of whole cells gives the sizes.
    whole = torch.full_like(inside[:, :1], cell)
    columns = torch.cat([inside, whole], 1).transpose(1, 2)
    at_a_time = max(1, VALUES_AT_A_TIME // max(1, active[:1].numel()))
    counts = torch.cat(
        [
            part.flatten(2).to(exact) @ inside_part
            for part, inside_part in zip(
                active.split(at_a_time), columns.split(at_a_time), strict=True
            )
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

    def __init__(self, filters: int, concepts: int) -> None:
        self.intersection: Tensor = torch.zeros(filters, concepts, dtype=torch.int64)
        self.union: Tensor = torch.zeros(filters, concepts, dtype=torch.int64)

    def update(self, seen: Overlap, concepts: Int[Tensor, "image region"]) -> None:
        """Takes in a batch; `concepts` numbers what each region shows, or is `ABSENT`."""
        is_there = concepts.flatten() != UNLABELLED
        numbers = concepts.flatten()[is_there]
        for total, part in (
            (self.intersection, seen.intersection),
            (self.union, seen.union),
        ):
            total.index_add_(1, numbers, part.movedim(1, 0).flatten(1)[:, is_there])

    @property
    def iou(self) -> Float[Tensor, "filter concept"]:
        """Intersection over union in float64; 0 where a concept never occurred."""
        return self.intersection.double() / self.union.clamp_min(1)
