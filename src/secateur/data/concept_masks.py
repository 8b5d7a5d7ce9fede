"""Concept masks: which pixels show which concept, at the images' and at coarser resolutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

UNLABELLED = -1
"""Concept index of a region that only fills up the tensor: its mask is empty, its vote is 0."""
CELL = 64
"""The count of a cell that is wholly inside, when coverage is counted."""


@dataclass(frozen=True)
class Concept:
    """Something that an image can show, such as a part, an object or a colour."""

    name: str
    category: str


@dataclass(frozen=True, eq=False)
class ConceptMasks:
    """The regions of a batch of images and the concepts that they show."""

    masks: Bool[Tensor, "image region height width"]
    """At the resolution of the images, or on a source's coarser grid."""
    concepts: Int[Tensor, "image region"]
    """Index of the concept that each region shows, or `UNLABELLED`."""


def join_masks(parts: Sequence[ConceptMasks]) -> ConceptMasks:
    """Return the regions of several batches as one; `UNLABELLED` regions fill up the tensor."""
    most = max(part.masks.shape[1] for part in parts)

    def filled(part: ConceptMasks) -> tuple[Tensor, Tensor]:
        missing = most - part.masks.shape[1]
        masks = F.pad(part.masks, (0, 0, 0, 0, 0, missing))
        return masks, F.pad(part.concepts, (0, missing), value=UNLABELLED)

    masks, concepts = zip(*map(filled, parts), strict=True)
    return ConceptMasks(torch.cat(masks), torch.cat(concepts))


def coverage_at(
    masks: Bool[Tensor, "image region height width"], size: tuple[int, int]
) -> UInt8[Tensor, "image region h w"]:
    """Return how much of each cell of a coarser or finer grid is inside, in 1 / `CELL`."""
    return (_covered(masks, size) * CELL).round().to(torch.uint8)


def at_resolution(
    masks: Bool[Tensor, "image region height width"], size: tuple[int, int]
) -> Bool[Tensor, "image region h w"]:
    """Return the masks on a coarser or finer grid: a cell is inside where at least half of it is.

    Areas are averaged, without upsampling to the image's resolution. A region too small to fill
    half of any cell keeps the cells that it fills most, so no region is lost.
    """
    if tuple(masks.shape[2:]) == size:
        return masks
    covered = _covered(masks, size)
    most = covered.amax(dim=(2, 3), keepdim=True)
    inside: Tensor = (covered >= most.clamp(max=0.5)) & (covered > 0)
    return inside


def _covered(masks: Tensor, size: tuple[int, int]) -> Tensor:
    covered: Tensor = F.adaptive_avg_pool2d(masks.float(), size)
    return covered
