"""Dissection: each filter's best concept by dataset-wide IoU, and its top images.

Network Dissection (Bau et al., CVPR 2017), with one departure: feature maps are upsampled four
times, not to the size of the image, and masks count by the fraction of each cell that they cover
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
from secateur.graph.taps import Kernels, taps_of
from secateur.runtime import distributed
from secateur.scoring.criteria import DeferredUpdate, FeatureBatch, Need, Regions, Size
from secateur.scoring.iou import IoUAccumulator, Overlap, binarise, overlap

DETECTOR_IOU = 0.04
"""A filter counts as a detector of a concept above this IoU (Bau et al., CVPR 2017, section 3)."""
UPSAMPLING = 4
"""How many times feature maps are upsampled, at most, before they are binarised: a power of two.
Without it a lone active cell counts as a whole, although the peak behind it is narrow."""


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
    """Accumulates the IoU of every filter with every concept; an `Observer`."""

    needs: frozenset[Need] = frozenset({"maps", "thresholds", "concepts"})

    def __init__(self, concept_names: tuple[str, ...]) -> None:
        self._names = concept_names
        self._accumulators: dict[str, IoUAccumulator] = {}
        self.thresholds: dict[str, Float[Tensor, "filter"]] = {}
        """By tap, the threshold above which each filter is active."""

    def reset(self, taps: Mapping[str, Kernels]) -> None:
        """Start anew; see `Observer.reset`."""
        self._accumulators = {
            tap: IoUAccumulator(kernels.filters, len(self._names), kernels.device)
            for tap, kernels in taps.items()
        }

    def update(self, features: FeatureBatch) -> DeferredUpdate:
        """Keep the maps that are active somewhere until the concepts are known."""
        assert features.statistics is not None
        thresholds = features.statistics.threshold
        self.thresholds[features.tap] = thresholds
        is_active = features.maps.amax(dim=(2, 3)) > thresholds  # [image, filter]
        maps = features.maps[is_active].float().split(is_active.sum(1).tolist())
        size = (features.maps.shape[2], features.maps.shape[3])
        accumulator = self._accumulators[features.tap]

        def count(regions: Regions) -> None:
            coverage = regions.coverage_at(_upsampled(size, regions.size))
            for image_maps, image_active, image_coverage, concepts in zip(
                maps, is_active, coverage, regions.concepts, strict=True
            ):
                image_overlap = _overlap(image_maps, thresholds, image_active, image_coverage)
                accumulator.update(image_overlap, concepts[None])

        return count

    def state(self) -> Iterable[Tensor]:
        """Return the sums over images; see `Observer.state`."""
        for accumulator in self._accumulators.values():
            yield from accumulator.state()

    def iou(self, tap: str) -> Float[Tensor, "filter concept"]:
        """Return the dataset-wide IoU of each of a tap's filters with each concept."""
        return self._accumulators[tap].compute()

    def iou_by_channel(self, group: Group) -> Float[Tensor, "channel concept"]:
        """Return the largest IoU of each channel's filters with each concept."""
        largest = torch.zeros(len(group), len(self._names), dtype=torch.float64)
        for name, tap in taps_of(group).items():
            index = torch.from_numpy(tap.channel)[:, None].expand(-1, len(self._names))
            largest.scatter_reduce_(0, index, self.iou(name), "amax")
        return largest

    def best(self, iou: Float[Tensor, "filter concept"]) -> list[FilterConcept]:
        """Return the concept of the largest IoU in each row, the first of equal ones."""
        values, order = iou.max(dim=1)
        return [
            FilterConcept(self._names[concept], value)
            for concept, value in zip(order.tolist(), values.tolist(), strict=True)
        ]


def _upsampled(size: Size, masks: Size) -> Size:
    """Return the size that maps are upsampled to: no finer than the masks are."""
    factor = UPSAMPLING
    while factor > 1 and (size[0] * factor > masks[0] or size[1] * factor > masks[1]):
        factor //= 2
    return size[0] * factor, size[1] * factor


def _overlap(
    maps: Float[Tensor, "active h w"],
    thresholds: Float[Tensor, "filter"],
    is_active: Bool[Tensor, "filter"],
    coverage: UInt8[Tensor, "region height width"],
) -> Overlap:
    """Return the overlap in one image, from the maps of the filters that are active in it.

    The others can be skipped: interpolated values are nowhere above the values around them. Areas
    are counted in 1 / `CELL` of a position.
    """
    size = (coverage.shape[1], coverage.shape[2])
    fine = maps[None]
    if fine.shape[1] and fine.shape[2:] != size:
        fine = F.interpolate(fine, size, mode="bilinear", align_corners=False)
    else:
        fine = fine.reshape(1, -1, *size)
    active = overlap(binarise(fine, thresholds[is_active]), coverage[None], CELL)
    intersection = active.intersection.new_zeros(1, len(is_active), len(coverage))
    intersection[:, is_active] = active.intersection
    union = coverage.sum(dim=(1, 2), dtype=torch.int64).expand_as(intersection).clone()
    union[:, is_active] = active.union
    return Overlap(intersection, union)


@dataclass(frozen=True, eq=False)
class TopFeatures:
    """The images that each of a tap's filters responds to most, the strongest response first."""

    values: Float[Tensor, "filter place"]
    """The largest activation in the image."""
    indices: Int[Tensor, "filter place"]
    """Index of the image in the calibration set."""
    regions: Bool[Tensor, "filter place h w"]
    """Where the filter is above its threshold there, on the grid of its map."""

    def cpu(self) -> TopFeatures:
        """Return the same on the CPU."""
        return TopFeatures(self.values.cpu(), self.indices.cpu(), self.regions.cpu())

    def best(self, count: int) -> TopFeatures:
        """Return the `count` strongest; of equal activations the image with the smaller index."""
        by_index = self.indices.argsort(1)
        order = self.values.gather(1, by_index).argsort(dim=1, descending=True, stable=True)
        places = by_index.gather(1, order[:, :count])
        return TopFeatures(
            self.values.gather(1, places),
            self.indices.gather(1, places),
            self.regions[torch.arange(len(places), device=places.device)[:, None], places],
        )


class TopImages:
    """The images that each filter responds to most, by its largest activation; an `Observer`."""

    needs: frozenset[Need] = frozenset({"maps", "thresholds"})

    def __init__(self, count: int) -> None:
        self._count = count
        self._top: dict[str, TopFeatures] = {}

    def reset(self, taps: Mapping[str, Kernels]) -> None:
        """Start anew; see `Observer.reset`."""
        self._top = {}

    def update(self, features: FeatureBatch) -> None:
        """Keep the best images of this batch and of those before it."""
        assert features.statistics is not None
        indices = features.indices.to(features.maps.device)
        by_index = indices.argsort()
        values = features.maps.float().amax(dim=(2, 3)).T[:, by_index]  # [filter, image]
        # Only these of the batch can be among the best: no other map is binarised.
        places = values.argsort(dim=1, descending=True, stable=True)[:, : self._count]
        images = by_index[places]
        filters = torch.arange(len(values), device=values.device)[:, None]
        regions = (
            features.maps[images, filters] > features.statistics.threshold[:, None, None, None]
        )
        new = TopFeatures(values.gather(1, places), indices[images], regions)
        old = self._top.get(features.tap)
        self._top[features.tap] = (new if old is None else _join([old, new])).best(self._count)

    def state(self) -> Iterable[Tensor]:
        """Return no tensors, since nothing here adds up over processes; see `merge`."""
        return ()

    def merge(self) -> None:
        """Keep the best images of all processes."""
        gathered = distributed.all_gather({tap: top.cpu() for tap, top in self._top.items()})
        self._top = {
            tap: _join([top[tap] for top in gathered]).best(self._count) for tap in self._top
        }

    def top(self, tap: str) -> TopFeatures:
        """Return the images that a tap's filters respond to most."""
        return self._top[tap]


def _join(parts: list[TopFeatures]) -> TopFeatures:
    return TopFeatures(
        torch.cat([part.values for part in parts], 1),
        torch.cat([part.indices for part in parts], 1),
        torch.cat([part.regions for part in parts], 1),
    )
