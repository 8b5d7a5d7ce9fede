"""How well each filter's activations lie on a concept: int64 tallies, IoU and response."""

from __future__ import annotations

from dataclasses import dataclass

import torch
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


def overlap(
    maps: Float[Tensor, "image filter h w"],
    thresholds: Float[Tensor, "filter"],
    masks: Bool[Tensor, "image region h w"],
) -> Overlap:
    """Positions where a filter is strictly above its threshold, against each region."""
    active = (maps > thresholds[:, None, None]).flatten(2).double()
    inside = masks.flatten(2).double()
    intersection = (active @ inside.transpose(1, 2)).long()  # exact: counts stay below 2^53
    sizes = active.sum(2).long()[:, :, None] + inside.sum(2).long()[:, None, :]
    return Overlap(intersection, sizes - intersection)


class AlignmentTally:
    """Dataset-wide IoU of each filter with each concept (Bau et al., CVPR 2017, eq. 1).

    A filter's activations count towards a concept's union only in images that show the concept,
    as in Network Dissection.
    """

    def __init__(self, filters: int, concepts: int) -> None:
        self.intersection = torch.zeros(filters, concepts, dtype=torch.int64)
        self.union = torch.zeros(filters, concepts, dtype=torch.int64)

    def add(self, seen: Overlap, concepts: Int[Tensor, "image region"]) -> None:
        """Takes in a batch; `concepts` numbers what each region shows."""
        for total, part in (
            (self.intersection, seen.intersection),
            (self.union, seen.union),
        ):
            total.index_add_(1, concepts.flatten(), part.movedim(1, 0).flatten(1))

    @property
    def iou(self) -> Float[Tensor, "filter concept"]:
        """Intersection over union in float64; 0 where a concept never occurred."""
        return self.intersection.double() / self.union.clamp_min(1)


def response_winners(
    maps: Float[Tensor, "image filter h w"],
    mean: Float[Tensor, "filter"],
    outgoing_norm: Float[Tensor, "filter"],
    inside: Bool[Tensor, "image h w"],
    top: int,
) -> Int[Tensor, "position top"]:
    """The filters that respond most at each position of a region.

    Response is |activation - mean| times the norm of the kernels that read the filter: how far
    it moves what comes after. A filter without any response wins nothing: its place holds the
    number of filters.
    """
    strength = (maps - mean[:, None, None]).abs().mul_(outgoing_norm[:, None, None])
    at_positions = strength.movedim(1, -1)[inside]  # [position, filter]
    values, winners = at_positions.topk(top, dim=1)
    return winners.where(values > 0, torch.tensor(maps.shape[1], device=winners.device))
