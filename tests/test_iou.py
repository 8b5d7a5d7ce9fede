from __future__ import annotations

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.data.concept_masks import CELL, UNLABELLED, coverage_at
from secateur.scoring.iou import IoUAccumulator, Overlap, binarise, overlap

SIDES = st.integers(1, 5)
COUNTS = st.integers(1, 4)
SEEDS = st.integers(0, 2**31)


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def a_case(
    images: int, filters: int, regions: int, height: int, width: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Random maps, thresholds and masks."""
    generator = drawn(seed)
    maps = torch.randn(images, filters, height, width, generator=generator)
    thresholds = torch.randn(filters, generator=generator)
    masks = torch.rand(images, regions, height, width, generator=generator) < 0.4
    return maps, thresholds, masks


@settings(deadline=None, max_examples=40)
@given(images=COUNTS, filters=COUNTS, regions=COUNTS, height=SIDES, width=SIDES, seed=SEEDS)
def test_overlap_equals_counting_position_by_position(
    images: int, filters: int, regions: int, height: int, width: int, seed: int
) -> None:
    maps, thresholds, masks = a_case(images, filters, regions, height, width, seed)
    seen = overlap(binarise(maps, thresholds), masks)
    assert seen.intersection.dtype == seen.union.dtype == torch.int64
    positions = [(row, column) for row in range(height) for column in range(width)]
    for i in range(images):
        for c in range(filters):
            active = {p for p in positions if maps[i, c][p].item() > thresholds[c].item()}
            for r in range(regions):
                inside = {p for p in positions if masks[i, r][p].item()}
                assert seen.intersection[i, c, r].item() == len(active & inside)
                assert seen.union[i, c, r].item() == len(active | inside)
                iou = len(active & inside) / max(1, len(active | inside))
                assert seen.iou[i, c, r].item() == pytest.approx(iou)


@settings(deadline=None, max_examples=40)
@given(filters=COUNTS, regions=COUNTS, height=SIDES, width=SIDES, seed=SEEDS)
def test_overlap_with_shares_of_cells_is_that_of_finer_maps(
    filters: int, regions: int, height: int, width: int, seed: int
) -> None:
    """Cells of two by two pixels: what is active is so in all four of them."""
    maps, thresholds, _ = a_case(2, filters, regions, height, width, seed)
    masks = a_case(2, filters, regions, 2 * height, 2 * width, seed + 1)[2]
    active = binarise(maps, thresholds)
    fine = overlap(active.repeat_interleave(2, 2).repeat_interleave(2, 3), masks)
    coarse = overlap(active, coverage_at(masks, (height, width)), CELL)
    assert torch.equal(coarse.intersection, fine.intersection * (CELL // 4))
    assert torch.equal(coarse.union, fine.union * (CELL // 4))


def test_overlap_of_a_large_map_is_exact() -> None:
    side = 600
    active = torch.ones(1, 1, side, side, dtype=torch.bool)
    shares = torch.full((1, 1, side, side), CELL, dtype=torch.uint8)
    shares[0, 0, 0, 0] = 1
    seen = overlap(active, shares, CELL)
    assert int(seen.intersection) == side * side * CELL - CELL + 1
    assert int(seen.union) == side * side * CELL


@settings(deadline=None, max_examples=40)
@given(images=COUNTS, filters=COUNTS, height=SIDES, width=SIDES, seed=SEEDS)
def test_iou_of_a_mask_with_itself_is_one(
    images: int, filters: int, height: int, width: int, seed: int
) -> None:
    masks = a_case(images, 1, filters, height, width, seed)[2]
    iou = overlap(binarise(masks.float(), torch.full((filters,), 0.5)), masks).iou
    expected = masks.flatten(2).any(2).double()
    assert torch.equal(iou.diagonal(dim1=1, dim2=2), expected)
    assert ((iou >= 0) & (iou <= 1)).all()


def test_iou_of_nothing_with_nothing_is_zero() -> None:
    seen = overlap(torch.zeros(2, 3, 4, 4).bool(), torch.zeros(2, 1, 4, 4).bool())
    assert torch.equal(seen.iou, torch.zeros(2, 3, 1, dtype=torch.float64))


def test_a_value_at_the_threshold_is_not_above_it() -> None:
    maps = torch.tensor([[[[0.5, 0.75]]]])
    seen = overlap(binarise(maps, torch.tensor([0.5])), torch.ones(1, 1, 1, 2).bool())
    assert seen.intersection.item() == 1


def test_thresholds_of_the_wrong_shape_are_refused() -> None:
    """Annotations of one axis are checked in tests just as those of several."""
    with pytest.raises(jaxtyping.TypeCheckError, match="thresholds"):
        binarise(torch.zeros(2, 3, 4, 4), torch.zeros(1))  # would broadcast without a word


def concepts_of(images: int, regions: int, concepts: int, seed: int) -> Tensor:
    return torch.randint(concepts, (images, regions), generator=drawn(seed))


@settings(deadline=None, max_examples=40)
@given(images=st.integers(1, 6), filters=COUNTS, regions=COUNTS, chunk=COUNTS, seed=SEEDS)
def test_tallies_do_not_depend_on_batches_or_their_order(
    images: int, filters: int, regions: int, chunk: int, seed: int
) -> None:
    maps, thresholds, masks = a_case(images, filters, regions, 4, 3, seed)
    concepts = concepts_of(images, regions, 5, seed)
    whole = IoUAccumulator(filters, 5)
    whole.update(overlap(binarise(maps, thresholds), masks), concepts)
    parts = IoUAccumulator(filters, 5)
    for indices in torch.randperm(images, generator=drawn(seed)).split(chunk):
        parts.update(
            overlap(binarise(maps[indices], thresholds), masks[indices]), concepts[indices]
        )
    assert parts.intersection.dtype == parts.union.dtype == torch.int64
    assert torch.equal(parts.intersection, whole.intersection)
    assert torch.equal(parts.union, whole.union)


@settings(deadline=None, max_examples=30)
@given(images=st.integers(1, 6), filters=COUNTS, regions=COUNTS, seed=SEEDS)
def test_tally_counts_a_concept_only_in_images_that_show_it(
    images: int, filters: int, regions: int, seed: int
) -> None:
    maps, thresholds, masks = a_case(images, filters, regions, 4, 3, seed)
    concepts = concepts_of(images, regions, 5, seed)
    seen = overlap(binarise(maps, thresholds), masks)
    accumulator = IoUAccumulator(filters, 5)
    accumulator.update(seen, concepts)
    for concept in range(5):
        shown = [(i, r) for i in range(images) for r in range(regions) if concepts[i, r] == concept]
        for c in range(filters):
            intersection = sum(int(seen.intersection[i, c, r]) for i, r in shown)
            union = sum(int(seen.union[i, c, r]) for i, r in shown)
            assert accumulator.intersection[c, concept].item() == intersection
            assert accumulator.union[c, concept].item() == union
            assert accumulator.compute()[c, concept].item() == pytest.approx(
                intersection / max(1, union)
            )


def test_an_image_without_the_concept_leaves_its_union_alone() -> None:
    maps = torch.ones(2, 1, 2, 2)  # active everywhere in both images
    masks = torch.zeros(2, 1, 2, 2, dtype=torch.bool)
    masks[0, 0, 0] = True
    masks[1] = True
    accumulator = IoUAccumulator(1, 2)
    accumulator.update(overlap(binarise(maps, torch.zeros(1)), masks), torch.tensor([[0], [1]]))
    assert accumulator.union.tolist() == [[4, 4]]
    assert accumulator.compute().tolist() == [[0.5, 1.0]]


def test_tally_keeps_counting_beyond_what_float32_can_hold() -> None:
    large = 2**24
    seen = Overlap(torch.full((1, 1, 1), large), torch.full((1, 1, 1), 2 * large + 1))
    one = Overlap(torch.ones(1, 1, 1).long(), torch.ones(1, 1, 1).long())
    accumulator = IoUAccumulator(1, 1)
    for part in (seen, one):
        accumulator.update(part, torch.zeros(1, 1, dtype=torch.int64))
    assert accumulator.intersection.item() == large + 1
    assert accumulator.union.item() == 2 * large + 2


def test_a_region_that_only_fills_up_counts_for_nobody() -> None:
    maps = torch.ones(2, 1, 2, 2)
    masks = torch.zeros(2, 2, 2, 2, dtype=torch.bool)
    masks[:, 0] = True
    accumulator = IoUAccumulator(1, 2)
    seen = overlap(binarise(maps, torch.zeros(1)), masks)
    accumulator.update(seen, torch.tensor([[0, UNLABELLED], [UNLABELLED, 1]]))
    assert accumulator.intersection.tolist() == [[4, 0]]
    assert accumulator.union.tolist() == [[4, 4]]
