"""Network Dissection as it is written, slow and independent: the reference for ours.

Bau et al., Network Dissection, CVPR 2017, section 2.2: a filter's threshold is the exact quantile
of all its activations at all positions of all images; each feature map is up-sampled bilinearly to
the resolution of the masks and binarised there; intersections and unions are counted in pixels
over all images that show a concept. Pixel centres are aligned (`align_corners=False`), where the
paper anchors at the centres of receptive fields. Uses nothing of secateur.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ABSENT = -1
FILTERS_AT_A_TIME = 64


class ExactThresholds:
    """Keeps the largest activations of each filter, as many as may exceed its threshold."""

    def __init__(self, positions: int, quantile: float) -> None:
        """`positions` are those of all images together."""
        self._rank = max(1, round(quantile * positions))
        self._largest: Tensor | None = None

    def add(self, maps: Tensor) -> None:
        """Takes in `[image, filter, h, w]`."""
        values = maps.movedim(1, 0).flatten(1)
        if self._largest is not None:
            values = torch.cat([self._largest, values], 1)
        if values.shape[1] > self._rank:
            values = values.topk(self._rank, dim=1, sorted=False).values
        self._largest = values.contiguous()

    @property
    def values(self) -> Tensor:
        """`[filter]`: the largest value that at least the share `quantile` of all reach."""
        assert self._largest is not None
        assert self._largest.shape[1] == self._rank, "not all positions have been seen"
        return self._largest.amin(1)


class LiteralTally:
    """Pixels in common of up-sampled, binarised maps and masks, over the images with a concept."""

    def __init__(self, thresholds: Tensor, concepts: int) -> None:
        self._thresholds = thresholds
        self.intersection = torch.zeros(len(thresholds), concepts, dtype=torch.int64)
        self.union = torch.zeros(len(thresholds), concepts, dtype=torch.int64)

    def add(self, maps: Tensor, masks: Tensor, concepts: Tensor) -> None:
        """Takes in `[image, filter, h, w]`, `[image, region, height, width]` and their numbers.

        A region is counted once for each image; a concept has at most one in an image.
        """
        for image, regions, numbers in zip(maps, masks, concepts, strict=True):
            there = numbers != ABSENT
            inside = regions[there].flatten(1).float()  # [region, pixel]
            self._add(image, inside, numbers[there], (regions.shape[1], regions.shape[2]))

    def _add(self, image: Tensor, inside: Tensor, numbers: Tensor, size: tuple[int, int]) -> None:
        self.union[:, numbers] += inside.sum(1).long()
        # What is up-sampled is never above its largest value: most filters are nowhere active.
        able = (image.amax(dim=(1, 2)) > self._thresholds).nonzero()[:, 0]
        for start in range(0, len(able), FILTERS_AT_A_TIME):
            chunk = able[start : start + FILTERS_AT_A_TIME]
            fine = F.interpolate(image[chunk][None], size, mode="bilinear", align_corners=False)[0]
            active = (fine > self._thresholds[chunk, None, None]).flatten(1).float()
            both = (active @ inside.T).long()  # exact: an image has fewer than 2^24 pixels
            rows, columns = chunk[:, None], numbers[None]
            self.intersection[rows, columns] += both
            self.union[rows, columns] += active.sum(1).long()[:, None] - both

    @property
    def iou(self) -> Tensor:
        """`[filter, concept]` in float64; 0 where a concept never occurred."""
        return self.intersection.double() / self.union.clamp_min(1)
