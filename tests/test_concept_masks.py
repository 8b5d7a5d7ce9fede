from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.data.concept_masks import (
    CELL,
    UNLABELLED,
    ConceptMasks,
    at_resolution,
    coverage_at,
    join_masks,
)

SIDES = st.integers(1, 9)
SEEDS = st.integers(0, 2**31)


def random_masks(images: int, regions: int, height: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(images, regions, height, width, generator=generator) < 0.3


@settings(deadline=None, max_examples=40)
@given(height=SIDES, width=SIDES, seed=SEEDS)
def test_masks_at_their_own_resolution_stay_as_they_are(height: int, width: int, seed: int) -> None:
    masks = random_masks(2, 3, height, width, seed)
    assert torch.equal(at_resolution(masks, (height, width)), masks)


@settings(deadline=None, max_examples=40)
@given(h=st.integers(1, 3), w=st.integers(1, 3), cell=st.integers(1, 4), seed=SEEDS)
def test_a_cell_is_inside_where_half_of_it_is(h: int, w: int, cell: int, seed: int) -> None:
    masks = random_masks(2, 2, h * cell, w * cell, seed)
    coarse = at_resolution(masks, (h, w))
    for i in range(2):
        for r in range(2):
            covered = {
                (y, x): sum(
                    bool(masks[i, r, y * cell + dy, x * cell + dx])
                    for dy in range(cell)
                    for dx in range(cell)
                )
                for y in range(h)
                for x in range(w)
            }
            most = max(covered.values())
            needed = cell * cell / 2 if 2 * most >= cell * cell else most
            for (y, x), count in covered.items():
                assert bool(coarse[i, r, y, x]) == (count > 0 and count >= needed)


@settings(deadline=None, max_examples=40)
@given(h=st.integers(1, 3), w=st.integers(1, 3), cell=st.sampled_from([1, 2, 4, 8]), seed=SEEDS)
def test_shares_of_cells_are_areas(h: int, w: int, cell: int, seed: int) -> None:
    masks = random_masks(2, 2, h * cell, w * cell, seed)
    areas = masks.reshape(2, 2, h, cell, w, cell).sum((3, 5))
    assert torch.equal(coverage_at(masks, (h, w)).long(), areas * CELL // cell**2)


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(2, 16),
    width=st.integers(2, 16),
    h=SIDES,
    w=SIDES,
    data=st.data(),
)
def test_no_region_is_lost_and_it_stays_where_it_was(
    height: int, width: int, h: int, w: int, data: st.DataObject
) -> None:
    row = data.draw(st.integers(0, height - 1))
    column = data.draw(st.integers(0, width - 1))
    masks = torch.zeros(1, 1, height, width, dtype=torch.bool)
    masks[0, 0, row, column] = True  # one pixel
    coarse = at_resolution(masks, (h, w))
    assert coarse.shape == (1, 1, h, w)
    assert coarse.any()
    for y, x in coarse[0, 0].nonzero().tolist():  # the pixel lies in every cell that is inside
        assert y * height // h <= row <= -(-(y + 1) * height // h) - 1
        assert x * width // w <= column <= -(-(x + 1) * width // w) - 1


@settings(deadline=None, max_examples=30)
@given(height=SIDES, width=SIDES, h=SIDES, w=SIDES)
def test_nothing_stays_nothing_and_everything_everything(
    height: int, width: int, h: int, w: int
) -> None:
    masks = torch.zeros(1, 2, height, width, dtype=torch.bool)
    masks[:, 1] = True
    coarse = at_resolution(masks, (h, w))
    assert not coarse[:, 0].any()
    assert coarse[:, 1].all()


def test_batches_with_fewer_regions_are_filled_up_with_absent_ones() -> None:
    few, many = random_masks(2, 1, 3, 4, 0), random_masks(3, 4, 3, 4, 1)
    numbers = torch.arange(12).reshape(3, 4)
    joined = join_masks([ConceptMasks(few, torch.tensor([[7], [8]])), ConceptMasks(many, numbers)])
    assert torch.equal(joined.masks[2:], many)
    assert torch.equal(joined.concepts[2:], numbers)
    assert torch.equal(joined.masks[:2, :1], few)
    assert not joined.masks[:2, 1:].any()
    assert joined.concepts[:2].tolist() == [[7, *3 * [UNLABELLED]], [8, *3 * [UNLABELLED]]]
