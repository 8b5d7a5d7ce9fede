"""What each filter sees: its best concept by dataset-wide IoU, and the images it responds to most.

Network Dissection (Bau et al., CVPR 2017), with one departure: feature maps are made four times
finer, not as fine as the image, and of masks there is counted how much of each cell they fill
(docs/explanation/dissection.md compares the two).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from secateur.data.concept_masks import CELL
from secateur.graph.groups import Group
from secateur.runtime import distributed
from secateur.scoring.criteria import FeatureBatch, Kernels, Need, Regions, Size, DeferredUpdate
from secateur.scoring.feature_pass import taps_of
from secateur.scoring.iou import IoUAccumulator, Overlap, binarise, overlap

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
        self._tallies: dict[str, IoUAccumulator] = {}
        self.thresholds: dict[str, Float[Tensor, "filter"]] = {}
        """Above which each filter of a part counts as active."""

    def reset(self, parts: Mapping[str, Kernels]) -> None:
        """Makes room for the tallies."""
        self._tallies = {
            part: IoUAccumulator(kernels.filters, len(self._names)) for part, kernels in parts.items()
        }

    def update(self, sight: FeatureBatch) -> DeferredUpdate:
        """Keeps a copy of the maps that are active somewhere until the concepts are known."""
        assert sight.statistics is not None
        thresholds = sight.statistics.threshold
        self.thresholds[sight.tap] = thresholds
        is_active = sight.maps.amax(dim=(2, 3)) > thresholds  # [image, filter]
        maps = sight.maps[is_active].float().split(is_active.sum(1).tolist())
        size = (sight.maps.shape[2], sight.maps.shape[3])
        tally = self._tallies[sight.tap]

        def count(regions: Regions) -> None:
            fine = _upsampled(size, regions.size)
            for some, here, shares, concepts in zip(
                maps, is_active, regions.coverage_at(fine), regions.concepts, strict=True
            ):
                tally.add(_overlap(some, thresholds, here, shares), concepts[None])

        return count

    def state(self) -> Iterable[Tensor]:
        """See `Observer.state`."""
        for tally in self._tallies.values():
            yield from (tally.intersection, tally.union)

    def iou(self, part: str) -> Float[Tensor, "filter concept"]:
        """Dataset-wide IoU of each filter of a part of a group with each concept."""
        return self._tallies[part].iou

    def iou_by_channel(self, group: Group) -> Float[Tensor, "channel concept"]:
        """The largest IoU of each channel's filters with each concept."""
        found = torch.zeros(len(group), len(self._names), dtype=torch.float64)
        for part, look in taps_of(group).items():
            index = torch.from_numpy(look.channel)[:, None].expand(-1, len(self._names))
            found.scatter_reduce_(0, index, self.iou(part), "amax")
        return found

    def best(self, iou: Float[Tensor, "filter concept"]) -> list[FilterConcept]:
        """The concept of the largest IoU in each row; between equal ones the first."""
        values, order = iou.max(dim=1)
        return [
            FilterConcept(self._names[concept], value)
            for concept, value in zip(order.tolist(), values.tolist(), strict=True)
        ]


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


@dataclass(frozen=True, eq=False)
class TopFeatures:
    """The images that each filter of a part of a group responds to most, the strongest first."""

    values: Float[Tensor, "filter place"]
    """The largest activation in the image."""
    indices: Int[Tensor, "filter place"]
    """Number of the image in the calibration set."""
    regions: Bool[Tensor, "filter place h w"]
    """Where the filter is above its threshold there, on the grid of its map."""

    def best(self, count: int) -> TopFeatures:
        """At most `count` of them; between equal activations the image with the smaller number."""
        by_number = self.indices.argsort(1)
        order = self.values.gather(1, by_number).argsort(dim=1, descending=True, stable=True)
        places = by_number.gather(1, order[:, :count])
        return TopFeatures(
            self.values.gather(1, places),
            self.indices.gather(1, places),
            self.regions[torch.arange(len(places))[:, None], places],
        )


class TopImages:
    """The images that each filter responds to most, by its largest activation; an `Observer`."""

    needs: frozenset[Need] = frozenset({"maps", "thresholds"})

    def __init__(self, count: int) -> None:
        self._count = count
        self._found: dict[str, TopFeatures] = {}

    def reset(self, parts: Mapping[str, Kernels]) -> None:
        """Starts with no image."""
        self._found = {}

    def update(self, sight: FeatureBatch) -> None:
        """Keeps the best of a batch and of what came before."""
        assert sight.statistics is not None
        by_number = sight.indices.argsort()
        values = sight.maps.float().amax(dim=(2, 3)).T[:, by_number]  # [filter, image]
        # Only these of the batch can be among the best: no other map is binarised.
        places = values.argsort(dim=1, descending=True, stable=True)[:, : self._count]
        images = by_number[places]
        filters = torch.arange(len(values))[:, None]
        regions = sight.maps[images, filters] > sight.statistics.threshold[:, None, None, None]
        new = TopFeatures(values.gather(1, places), sight.indices[images], regions)
        old = self._found.get(sight.tap)
        self._found[sight.tap] = (new if old is None else _joined([old, new])).best(self._count)

    def state(self) -> Iterable[Tensor]:
        """None that add up; see `merge`."""
        return ()

    def merge(self) -> None:
        """Keeps the best of what all processes have found."""
        found = distributed.all_gather(self._found)
        self._found = {
            part: _joined([each[part] for each in found]).best(self._count) for part in self._found
        }

    def top(self, part: str) -> TopFeatures:
        """What was found of a part."""
        return self._found[part]


def _joined(some: list[TopFeatures]) -> TopFeatures:
    return TopFeatures(
        torch.cat([each.values for each in some], 1),
        torch.cat([each.indices for each in some], 1),
        torch.cat([each.regions for each in some], 1),
    )
