from __future__ import annotations

import pytest
import torch

from secateur.second_moments import POSITIONS, SecondMoments


def test_products_are_those_of_every_position(generator: torch.Generator) -> None:
    maps = torch.randn(5, 3, 4, 6, generator=generator)
    moments = SecondMoments(3)
    for part in maps.split(2):
        moments.add(part)
    rows = maps.double().movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(moments.raw, rows.T @ rows / len(rows), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("side", [14, 28, 32, 56, 112])
def test_positions_are_spread_over_the_columns(side: int) -> None:
    """Each filter is 1 in one column: at least half of the columns are met, none too often."""
    maps = torch.eye(side)[None, :, None].expand(1, side, side, side)
    moments = SecondMoments(side)
    moments.add(maps)
    share = moments.raw.diagonal()
    assert (share > 0).double().mean() > 0.5
    assert share.max() < 0.1


def test_large_maps_are_sampled_evenly() -> None:
    """A map whose rows and columns are as often 1 as 0 keeps its mean."""
    side = 32
    stripes = (torch.arange(side) % 2).float()
    maps = torch.stack([stripes.expand(side, side), stripes[:, None].expand(side, side)])[None]
    moments = SecondMoments(2)
    moments.add(maps)
    assert side * side > POSITIONS
    assert 0.4 < float(moments.raw[0, 0]) < 0.6
    assert 0.4 < float(moments.raw[1, 1]) < 0.6
