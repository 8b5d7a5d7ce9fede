from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.thresholds import MAX_VALUES_A_BATCH, UsualTally

SIZES = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))
QUANTILES = st.floats(0.0, 1.0)
SEEDS = st.integers(0, 2**31)


def maps_of(size: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def tally_of(*batches: Tensor) -> UsualTally:
    tally = UsualTally()
    for maps in batches:
        tally.add(maps)
    return tally


def sorted_values(maps: Tensor, channel: int) -> list[float]:
    """Every activation of one filter, the largest first."""
    return sorted(maps[:, channel].flatten().tolist(), reverse=True)


@settings(deadline=None, max_examples=60)
@given(size=SIZES, quantile=QUANTILES, seed=SEEDS)
def test_threshold_is_what_a_sort_of_each_filter_finds(
    size: tuple[int, ...], quantile: float, seed: int
) -> None:
    maps = maps_of(size, seed)
    usual = tally_of(maps).finish(quantile)
    for channel in range(size[1]):
        values = sorted_values(maps, channel)
        reached = max(1, round(quantile * len(values)))
        assert usual.threshold[channel].item() == values[reached - 1]


@settings(deadline=None, max_examples=60)
@given(size=SIZES, quantile=QUANTILES, seed=SEEDS)
def test_share_above_the_threshold_is_the_quantile_to_within_one_position(
    size: tuple[int, ...], quantile: float, seed: int
) -> None:
    maps = maps_of(size, seed)
    usual = tally_of(maps).finish(quantile)
    positions = maps[:, 0].numel()
    above = (maps > usual.threshold[:, None, None]).sum(dim=(0, 2, 3))
    assert ((above.double() / positions - quantile).abs() <= 1.5 / positions + 1e-12).all()


@settings(deadline=None, max_examples=40)
@given(size=SIZES, seed=SEEDS)
def test_mean_is_that_of_every_position(size: tuple[int, ...], seed: int) -> None:
    maps = maps_of(size, seed)
    mean = tally_of(maps).finish(0.1).mean
    for channel in range(size[1]):
        values = sorted_values(maps, channel)
        assert mean[channel].item() == pytest.approx(sum(values) / len(values), abs=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    size=SIZES,
    quantile=QUANTILES,
    seed=SEEDS,
    chunk=st.integers(1, 4),
)
def test_batches_do_not_matter_when_nothing_is_left_out(
    size: tuple[int, ...], quantile: float, seed: int, chunk: int
) -> None:
    maps = maps_of(size, seed)
    whole = tally_of(maps).finish(quantile)
    parts = tally_of(*maps.split(chunk)).finish(quantile)
    assert torch.equal(whole.threshold, parts.threshold)
    assert torch.equal(whole.mean, parts.mean)


def test_large_maps_are_sampled_and_the_share_stays_close(generator: torch.Generator) -> None:
    maps = torch.randn(8, 3, 64, 64, generator=generator)
    assert maps[:, 0].numel() > MAX_VALUES_A_BATCH
    usual = tally_of(maps).finish(0.1)
    share = (maps > usual.threshold[:, None, None]).double().mean(dim=(0, 2, 3))
    # Five standard errors of a share of 0.1 among at least half of MAX_VALUES_A_BATCH positions.
    assert ((share - 0.1).abs() < 5 * (0.1 * 0.9 / (MAX_VALUES_A_BATCH / 2)) ** 0.5).all()
    assert (usual.mean.abs() < 5 / (MAX_VALUES_A_BATCH / 2) ** 0.5).all()


@pytest.mark.parametrize("side", [32, 64, 128])
def test_the_sample_meets_every_column_of_a_large_map(side: int) -> None:
    maps = torch.zeros(16, side, side, side)  # filter c is active in column c alone
    maps[:, torch.arange(side), :, torch.arange(side)] = 1.0
    usual = tally_of(maps).finish(0.5)
    assert (usual.mean > 0).all()
    assert usual.mean.mean().item() == pytest.approx(1 / side, rel=1e-5)


def test_what_was_added_does_not_follow_later_changes_of_the_maps(
    generator: torch.Generator,
) -> None:
    maps = torch.randn(2, 3, 4, 4, generator=generator)
    tally = tally_of(maps)
    before = tally.finish(0.25)
    maps.zero_()
    assert torch.equal(tally.finish(0.25).threshold, before.threshold)


def test_a_filter_that_never_varies_is_never_above_its_threshold() -> None:
    maps = torch.full((2, 1, 3, 3), 0.7)
    usual = tally_of(maps).finish(0.2)
    assert usual.threshold.item() == maps[0, 0, 0, 0].item()
    assert usual.mean.item() == pytest.approx(0.7)
