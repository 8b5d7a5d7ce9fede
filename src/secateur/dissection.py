"""What each filter sees: its best concept by dataset-wide IoU, and the images it responds to most.

Network Dissection (Bau et al., CVPR 2017), with one departure: feature maps are made four times
finer, not as fine as the image, and of masks there is counted how much of each cell they fill
(docs/dissection.md compares the two).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from secateur import distributed
from secateur.activations import parts_of
from secateur.alignment import AlignmentTally, Overlap, binarise, overlap
from secateur.criteria import Kernels, Need, Regions, Sight, Size, Vote
from secateur.grouping import Group
from secateur.regions import CELL

DETECTOR_IOU = 0.04
"""A filter counts as a detector of a concept above this IoU (Bau et al., CVPR 2017, section 3)."""
UPSAMPLING = 4
"""A feature map is made at most so many times finer before it is binarised, a power of two. Without
it a lone active cell counts whole, while the peak that it stands for is narrow."""


@dataclass(frozen=True)
class FilterConcept:
    """The concept that a filter's activations overlap best."""

    concept: str
    iou: float

    @property
    def is_detector(self) -> bool:
        """Whether the overlap is large enough to call the filter a detector."""
        return self.iou > DETECTOR_IOU


class Dissection:
    """Tallies the overlap of every filter with every concept; an `Observer`."""

    needs: frozenset[Need] = frozenset({"maps", "thresholds", "concepts"})

    def __init__(self, concept_names: tuple[str, ...]) -> None:
        self._names = concept_names
        self._tallies: dict[str, AlignmentTally] = {}
        self.thresholds: dict[str, Float[Tensor, "filter"]] = {}
        """Above which each filter of a part counts as active."""

    def begin(self, parts: Mapping[str, Kernels]) -> None:
        """Makes room for the tallies."""
        self._tallies = {
            part: AlignmentTally(kernels.filters, len(self._names))
            for part, kernels in parts.items()
        }

    def observe(self, sight: Sight) -> Vote:
        """Keeps a copy of the maps that are active somewhere until the concepts are known."""
        assert sight.usual is not None
        thresholds = sight.usual.threshold
        self.thresholds[sight.part] = thresholds
        is_active = sight.maps.amax(dim=(2, 3)) > thresholds  # [image, filter]
        maps = sight.maps[is_active].float().split(is_active.sum(1).tolist())
        size = (sight.maps.shape[2], sight.maps.shape[3])
        tally = self._tallies[sight.part]

        def count(regions: Regions) -> None:
            fine = _upsampled(size, regions.size)
            for some, here, shares, concepts in zip(
                maps, is_active, regions.shares_at(fine), regions.concepts, strict=True
            ):
                tally.add(_overlap(some, thresholds, here, shares), concepts[None])

        return count

    def tallies(self) -> Iterable[Tensor]:
        """See `Observer.tallies`."""
        for tally in self._tallies.values():
            yield from (tally.intersection, tally.union)

    def iou(self, part: str) -> Float[Tensor, "filter concept"]:
        """Dataset-wide IoU of each filter of a part of a group with each concept."""
        return self._tallies[part].iou

    def best(self, part: str) -> list[FilterConcept]:
        """The best concept of each filter of a part of a group; between equal ones the first."""
        values, order = self.iou(part).max(dim=1)
        return [
            FilterConcept(self._names[concept], iou)
            for concept, iou in zip(order.tolist(), values.tolist(), strict=True)
        ]

    def best_by_channel(self, group: Group) -> list[FilterConcept]:
        """The best concept of each channel of a group, of all its filters."""
        found: dict[int, FilterConcept] = {}
        for part, look in parts_of(group).items():
            for channel, seen in zip(look.channel.tolist(), self.best(part), strict=True):
                if channel not in found or seen.iou > found[channel].iou:
                    found[channel] = seen
        return [found[channel] for channel in range(len(group))]


def _upsampled(size: Size, masks: Size) -> Size:
    """What maps of a size are brought to: no finer than the masks are."""
    factor = UPSAMPLING
    while factor > 1 and (size[0] * factor > masks[0] or size[1] * factor > masks[1]):
        factor //= 2
    return size[0] * factor, size[1] * factor


def _overlap(
    maps: Float[Tensor, "active h w"],
    thresholds: Float[Tensor, "filter"],
    is_active: Bool[Tensor, "filter"],
    shares: UInt8[Tensor, "region height width"],
) -> Overlap:
    """The overlap in one image, given the maps of those filters that are active somewhere in it.

    The others can be passed over: what is interpolated is nowhere above the values around it. Areas
    are counted in 1 / `regions.CELL` of a position.
    """
    size = (shares.shape[1], shares.shape[2])
    fine = maps[None]
    if fine.shape[1] and fine.shape[2:] != size:
        fine = F.interpolate(fine, size, mode="bilinear", align_corners=False)
    else:
        fine = fine.reshape(1, -1, *size)
    seen = overlap(binarise(fine, thresholds[is_active]), shares[None], CELL)
    intersection = seen.intersection.new_zeros(1, len(is_active), len(shares))
    intersection[:, is_active] = seen.intersection
    union = shares.sum(dim=(1, 2), dtype=torch.int64).expand_as(intersection).clone()
    union[:, is_active] = seen.union
    return Overlap(intersection, union)


class TopImages:
    """The images that each filter responds to most, by its largest activation; an `Observer`."""

    needs: frozenset[Need] = frozenset({"maps"})

    def __init__(self, count: int) -> None:
        self._count = count
        self._found: dict[str, tuple[Tensor, Tensor]] = {}
        """`[filter, place]`: activations and numbers of images, the largest first."""

    def begin(self, parts: Mapping[str, Kernels]) -> None:
        """Starts with no image."""
        self._found = {
            part: (torch.zeros(kernels.filters, 0), torch.zeros(kernels.filters, 0).long())
            for part, kernels in parts.items()
        }

    def observe(self, sight: Sight) -> None:
        """Keeps the best of a batch and of what came before."""
        largest = sight.maps.float().amax(dim=(2, 3)).T  # [filter, image]
        numbers = sight.numbers.expand(len(largest), -1)
        self._found[sight.part] = self._best([self._found[sight.part], (largest, numbers)])

    def _best(self, parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Between equal activations the image with the smaller number is kept."""
        values, numbers = (torch.cat(each, 1) for each in zip(*parts, strict=True))
        by_number = numbers.argsort(1)
        values, numbers = values.gather(1, by_number), numbers.gather(1, by_number)
        order = values.argsort(dim=1, descending=True, stable=True)[:, : self._count]
        return values.gather(1, order), numbers.gather(1, order)

    def tallies(self) -> Iterable[Tensor]:
        """None that add up; see `merge`."""
        return ()

    def merge(self) -> None:
        """Keeps the best of what all processes have found."""
        found = distributed.gathered(self._found)
        self._found = {part: self._best([each[part] for each in found]) for part in self._found}

    def numbers(self, part: str) -> Int[Tensor, "filter place"]:
        """Numbers of the images in the probe set, the one with the largest activation first."""
        return self._found[part][1]
