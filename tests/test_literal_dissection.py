"""The literal dissection against plain loops, and ours against the literal one."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from literal_dissection import ABSENT, ExactThresholds, LiteralTally
from secateur.data.concept_masks import ConceptMasks
from secateur.graph.taps import Kernels
from secateur.scoring.criteria import FeatureBatch, Regions
from secateur.scoring.dissection import Dissection
from secateur.scoring.thresholds import ActivationStatistics, StatisticsAccumulator

SEEDS = st.integers(0, 2**31)
NAMES = ("sky", "road", "tree")


def concept_input(
    seed: int, images: int, filters: int, map_size: tuple[int, int], mask_size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Whole numbers as maps, masks, and which concept each region shows."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randint(-40, 41, (images, filters, *map_size), generator=generator).float()
    masks = torch.rand(images, 2, *mask_size, generator=generator) < 0.4
    order = torch.rand(images, len(NAMES), generator=generator).argsort(1)[:, :2]
    absent = torch.rand(images, 2, generator=generator) < 0.2
    return maps, masks & ~absent[:, :, None, None], order.where(~absent, ABSENT)


def kernels_of(filters: int) -> Kernels:
    return Kernels((), torch.arange(filters), (), ())


def dissected(
    maps: Tensor,
    masks: Tensor,
    concepts: Tensor,
    statistics: ActivationStatistics,
    batches: list[slice],
) -> Dissection:
    filters = maps.shape[1]
    dissection = Dissection(NAMES)
    dissection.reset({"layer": kernels_of(filters)})
    for batch in batches:
        seen = FeatureBatch(
            tap="layer",
            maps=maps[batch],
            indices=torch.arange(len(maps))[batch],
            kernels=kernels_of(filters),
            statistics=statistics,
            grid=(1, 1),
            gradients=None,
        )
        vote = dissection.update(seen)
        vote(Regions(ConceptMasks(masks[batch], concepts[batch])))
    return dissection


def literal(
    maps: Tensor, masks: Tensor, concepts: Tensor, quantile: float
) -> tuple[Tensor, LiteralTally]:
    thresholds = ExactThresholds(len(maps) * maps.shape[2] * maps.shape[3], quantile)
    for batch in maps.split(2):
        thresholds.add(batch)
    tally = LiteralTally(thresholds.values, len(NAMES))
    tally.add(maps, masks, concepts)
    return thresholds.values, tally


@settings(deadline=None, max_examples=40)
@given(
    seed=SEEDS,
    images=st.integers(1, 5),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    quantile=st.sampled_from([0.01, 0.1, 0.5]),
)
def test_ours_is_the_literal_one_where_maps_are_as_fine_as_the_masks(
    seed: int, images: int, height: int, width: int, quantile: float
) -> None:
    maps, masks, concepts = concept_input(seed, images, 3, (height, width), (height, width))
    # Thresholds too: whole numbers up to 40 in size have a bin of the histogram each.
    statistics = StatisticsAccumulator(3, height * width)
    statistics.update(maps)
    dissection = dissected(
        maps, masks, concepts, statistics.compute(quantile), [slice(0, 1), slice(1, images)]
    )
    assert torch.equal(dissection.iou("layer"), literal(maps, masks, concepts, quantile)[1].iou)


@settings(deadline=None, max_examples=40)
@given(
    seed=SEEDS,
    height=st.integers(1, 4),
    width=st.integers(1, 4),
    factor=st.sampled_from([2, 4]),
    quantile=st.sampled_from([0.05, 0.3]),
)
def test_ours_is_the_literal_one_up_to_four_times_the_resolution_of_maps(
    seed: int, height: int, width: int, factor: int, quantile: float
) -> None:
    size = (height * factor, width * factor)
    maps, masks, concepts = concept_input(seed, 3, 4, (height, width), size)
    thresholds, tally = literal(maps, masks, concepts, quantile)
    statistics = ActivationStatistics(thresholds, thresholds, thresholds, 1)
    dissection = dissected(maps, masks, concepts, statistics, [slice(0, 3)])
    assert torch.equal(dissection.iou("layer"), tally.iou)


def test_masks_coarser_than_maps_are_brought_to_them() -> None:
    maps, masks, concepts = concept_input(3, 2, 3, (8, 8), (2, 2))
    thresholds = torch.full((3,), 5.0)
    statistics = ActivationStatistics(thresholds, thresholds, thresholds, 1)
    fine = masks.repeat_interleave(4, 2).repeat_interleave(4, 3)
    dissection = dissected(maps, masks, concepts, statistics, [slice(0, 2)])
    expected = dissected(maps, fine, concepts, statistics, [slice(0, 2)])
    assert torch.equal(dissection.iou("layer"), expected.iou("layer"))


def interpolated(row: list[float], size: int, place: int) -> tuple[int, int, float]:
    """The two cells around a pixel of a finer grid and the weight of the second."""
    centre = max(0.0, (place + 0.5) * len(row) / size - 0.5)
    first = min(int(centre), len(row) - 1)
    return first, min(first + 1, len(row) - 1), centre - first


@settings(deadline=None, max_examples=25)
@given(
    seed=SEEDS,
    h=st.integers(1, 3),
    w=st.integers(1, 3),
    quantile=st.sampled_from([0.05, 0.3]),
)
def test_the_literal_dissection_is_that_of_plain_loops(
    seed: int, h: int, w: int, quantile: float
) -> None:
    # Four and eight times as fine: then the weights are exact, whatever is rounded first.
    height, width = 4 * h, 8 * w
    maps, masks, concepts = concept_input(seed, 3, 2, (h, w), (height, width))
    thresholds, tally = literal(maps, masks, concepts, quantile)
    for filter_ in range(2):
        values = sorted(maps[:, filter_].flatten().tolist(), reverse=True)
        threshold = values[max(1, round(quantile * len(values))) - 1]
        assert float(thresholds[filter_]) == threshold
        for concept in range(len(NAMES)):
            both = either = 0
            for image in range(3):
                for region in range(2):
                    if int(concepts[image, region]) != concept:
                        continue
                    for y in range(height):
                        for x in range(width):
                            top, bottom, down = interpolated([0.0] * h, height, y)
                            left, right, along = interpolated([0.0] * w, width, x)
                            cells = maps[image, filter_]
                            value = (1 - down) * (
                                (1 - along) * cells[top, left] + along * cells[top, right]
                            ) + down * (
                                (1 - along) * cells[bottom, left] + along * cells[bottom, right]
                            )
                            active = bool(value > threshold)
                            inside = bool(masks[image, region, y, x])
                            both += active and inside
                            either += active or inside
            assert int(tally.intersection[filter_, concept]) == both
            assert int(tally.union[filter_, concept]) == either
