from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.runtime.errors import DataError
from secateur.scoring.thresholds import ActivationStatistics, StatisticsAccumulator

SIZES = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))
QUANTILES = st.floats(0.0, 1.0)
SEEDS = st.integers(0, 2**31)
SCALES = st.sampled_from([1e-30, 1e-3, 1.0, 1e4])
ALL_POSITIONS = 10**6


def maps_of(size: tuple[int, ...], seed: int, scale: float = 1.0, spread: float = 1.0) -> Tensor:
    """Normal values; with a large `spread` their sizes lie many octaves apart."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randn(size, generator=generator)
    octaves = torch.randn(size, generator=generator) * spread
    return (signs * octaves.exp2() * scale).clamp(-1e9, 1e9)


def tally_of(*batches: Tensor, positions: int = ALL_POSITIONS) -> StatisticsAccumulator:
    tally = StatisticsAccumulator(batches[0].shape[1], positions)
    for maps in batches:
        tally.update(maps)
    return tally


def sorted_values(maps: Tensor, channel: int) -> list[float]:
    """Every activation of one filter, the largest first."""
    return sorted(maps[:, channel].flatten().tolist(), reverse=True)


def exact_thresholds(maps: Tensor, quantile: float) -> list[float]:
    """The largest value of each filter that at least the share `quantile` reach."""
    statistics = []
    for channel in range(maps.shape[1]):
        values = sorted_values(maps, channel)
        statistics.append(values[max(1, round(quantile * len(values))) - 1])
    return statistics


def assert_same(one: ActivationStatistics, other: ActivationStatistics) -> None:
    assert torch.equal(one.mean, other.mean)
    assert torch.equal(one.threshold, other.threshold)
    assert torch.equal(one.largest, other.largest)


def assert_close_to_exact(statistics: ActivationStatistics, maps: Tensor, quantile: float) -> None:
    """Never below the exact quantile; above it by as much as the docstring says."""
    for channel, exact in enumerate(exact_thresholds(maps, quantile)):
        threshold = statistics.threshold[channel].item()
        largest = maps[:, channel].abs().max().item()
        margin = max(abs(exact) / 64, largest / 2**9)
        assert exact <= threshold <= exact + margin, (channel, exact, threshold, largest)


@settings(deadline=None, max_examples=100)
@given(
    size=SIZES,
    quantile=QUANTILES,
    seed=SEEDS,
    scale=SCALES,
    spread=st.sampled_from([0.0, 1.0, 6.0]),
)
def test_threshold_equals_the_sorted_quantile_to_within_a_bin(
    size: tuple[int, ...], quantile: float, seed: int, scale: float, spread: float
) -> None:
    maps = maps_of(size, seed, scale, spread)
    assert_close_to_exact(tally_of(maps).compute(quantile), maps, quantile)


def test_a_small_negative_threshold_is_that_of_the_bin_around_zero() -> None:
    maps = maps_of((1, 1, 2, 4), 0, 1e-30, 6.0)
    assert_close_to_exact(tally_of(maps).compute(0.75), maps, 0.75)


@settings(deadline=None, max_examples=60)
@given(size=SIZES, quantile=QUANTILES, seed=SEEDS, sign=st.sampled_from([-1.0, 1.0]))
def test_thresholds_of_one_sign_are_within_a_bin(
    size: tuple[int, ...], quantile: float, seed: int, sign: float
) -> None:
    maps = sign * maps_of(size, seed).abs()
    assert_close_to_exact(tally_of(maps).compute(quantile), maps, quantile)


@settings(deadline=None, max_examples=60)
@given(size=SIZES, quantile=QUANTILES, seed=SEEDS)
def test_share_above_the_threshold_is_the_quantile_at_most(
    size: tuple[int, ...], quantile: float, seed: int
) -> None:
    """At most, to within one position; and less only by what lies within the margin."""
    maps = maps_of(size, seed)
    statistics = tally_of(maps).compute(quantile)
    positions = maps[:, 0].numel()
    above = (maps > statistics.threshold[:, None, None]).sum(dim=(0, 2, 3)).double() / positions
    assert (above - quantile <= 1.5 / positions + 1e-12).all()
    for channel, exact in enumerate(exact_thresholds(maps, quantile)):
        values = maps[:, channel]
        margin = max(abs(exact) / 64, values.abs().max().item() / 2**9)
        near = ((values > exact) & (values <= exact + margin)).sum().item() / positions
        assert above[channel].item() + near >= quantile - 1.5 / positions - 1e-12


@settings(deadline=None, max_examples=40)
@given(size=SIZES, seed=SEEDS)
def test_mean_is_that_of_every_position(size: tuple[int, ...], seed: int) -> None:
    maps = maps_of(size, seed)
    mean = tally_of(maps).compute(0.1).mean
    for channel in range(size[1]):
        values = sorted_values(maps, channel)
        assert mean[channel].item() == pytest.approx(sum(values) / len(values), abs=1e-6)


@settings(deadline=None, max_examples=40)
@given(size=SIZES, seed=SEEDS, scale=SCALES)
def test_no_value_is_larger_than_the_largest_nor_half_of_it(
    size: tuple[int, ...], seed: int, scale: float
) -> None:
    maps = maps_of(size, seed, scale)
    largest = tally_of(maps).compute(0.1).largest
    actual = maps.abs().amax(dim=(0, 2, 3))
    assert (largest >= actual).all()
    assert (largest <= 2 * actual).all()


@settings(deadline=None, max_examples=60)
@given(
    size=SIZES,
    quantile=QUANTILES,
    seed=SEEDS,
    chunk=st.integers(1, 4),
    positions=st.sampled_from([1, 4, 9, ALL_POSITIONS]),
    spread=st.sampled_from([1.0, 8.0]),
)
def test_batches_and_their_order_do_not_matter(
    size: tuple[int, ...], quantile: float, seed: int, chunk: int, positions: int, spread: float
) -> None:
    maps = maps_of(size, seed, spread=spread)
    whole = tally_of(maps, positions=positions).compute(quantile)
    order = torch.randperm(len(maps), generator=torch.Generator().manual_seed(seed))
    for parts in (maps.split(chunk), maps.flip(0).split(chunk), maps[order].split(1)):
        assert_same(tally_of(*parts, positions=positions).compute(quantile), whole)


def test_larger_values_that_come_late_move_the_bins() -> None:
    """Octave by octave, far more than a histogram holds."""
    maps = torch.randn(40, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    maps *= torch.arange(-20.0, 20.0).exp2()[:, None, None, None]
    growing, shrinking = tally_of(*maps.split(1)), tally_of(*maps.flip(0).split(1))
    for quantile in (0.001, 0.1, 0.5, 0.9, 0.999):
        assert_same(growing.compute(quantile), shrinking.compute(quantile))
        assert_close_to_exact(growing.compute(quantile), maps, quantile)


def test_bfloat16_maps_are_counted_like_their_values(generator: torch.Generator) -> None:
    maps = torch.randn(4, 3, 6, 6, generator=generator).bfloat16()
    assert_same(tally_of(maps).compute(0.1), tally_of(maps.float()).compute(0.1))


def test_large_maps_are_sampled_and_the_share_stays_close(generator: torch.Generator) -> None:
    positions = 256
    maps = torch.randn(8, 3, 64, 64, generator=generator)
    statistics = tally_of(maps, positions=positions).compute(0.1)
    share = (maps > statistics.threshold[:, None, None]).double().mean(dim=(0, 2, 3))
    # Five standard errors of a share of 0.1 among at least half of the positions asked for, and
    # what a bin holds: 1/64 of the threshold, times the density there.
    looked_at = 8 * positions / 2
    bin_share = 1.29 / 64 * 0.18
    assert ((share - 0.1).abs() < 5 * (0.1 * 0.9 / looked_at) ** 0.5 + bin_share).all()
    torch.testing.assert_close(statistics.mean, maps.mean((0, 2, 3)))  # of every position


@pytest.mark.parametrize("side", [32, 64, 128])
def test_the_sample_meets_every_column_of_a_large_map(side: int) -> None:
    maps = torch.zeros(2, side, side, side)  # filter c is active in column c alone
    maps[:, torch.arange(side), :, torch.arange(side)] = 1.0
    positions = 16 * side
    statistics = tally_of(maps, positions=positions).compute(0.25 / side)
    assert (statistics.threshold == 1).all()  # less than the share of a column, which has been met
    assert (statistics.mean > 0).all()
    assert statistics.mean.mean().item() == pytest.approx(1 / side, rel=1e-5)


def test_sums_do_not_follow_later_changes_of_the_maps(
    generator: torch.Generator,
) -> None:
    maps = torch.randn(2, 3, 4, 4, generator=generator)
    tally = tally_of(maps)
    before = tally.compute(0.25)
    maps.zero_()
    assert_same(tally.compute(0.25), before)


@pytest.mark.parametrize("value", [0.7, -0.7, 0.0, 1e-30, -1e30 / 1e22, 2.0**-130])
@pytest.mark.parametrize("quantile", [0.001, 0.2, 1.0])
def test_a_filter_that_never_varies_is_never_above_its_threshold(
    value: float, quantile: float
) -> None:
    maps = torch.full((2, 1, 3, 3), value)
    statistics = tally_of(maps).compute(quantile)
    assert statistics.threshold.item() == maps[0, 0, 0, 0].item()
    assert not (maps > statistics.threshold[:, None, None]).any()
    assert statistics.mean.item() == pytest.approx(value)


def test_a_dead_filter_beside_a_living_one_is_never_active(generator: torch.Generator) -> None:
    maps = torch.randn(4, 2, 5, 5, generator=generator)
    maps[:, 1] = 0.0
    statistics = tally_of(*maps.split(1)).compute(0.01)
    assert statistics.threshold[1].item() == 0.0
    assert not (maps[:, 1] > statistics.threshold[1]).any()
    assert (maps[:, 0] > statistics.threshold[0]).any() or maps[:, 0].max() == statistics.threshold[
        0
    ]


def test_a_filter_that_is_mostly_silent_is_active_where_it_is_not() -> None:
    maps = torch.zeros(1, 1, 10, 10)
    maps[0, 0, 0, :5] = 3.0
    statistics = tally_of(maps).compute(
        0.2
    )  # zero is the value that a fifth of the positions reach
    assert 0 <= statistics.threshold.item() <= 3 / 2**10
    assert (maps > statistics.threshold[:, None, None]).sum() == 5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_values_that_are_not_finite_are_an_error(value: float, place: int) -> None:
    """Also where the position is not among those that thresholds are taken from."""
    maps = torch.zeros(2, 3, 4, 4)
    maps[1, 2].flatten()[place] = value
    tally = StatisticsAccumulator(3, 1)
    with pytest.raises(DataError, match="values that are not finite"):
        tally.update(maps)


def test_without_thresholds_the_rest_is_the_same(generator: torch.Generator) -> None:
    maps = torch.randn(6, 3, 5, 5, generator=generator)
    tally = StatisticsAccumulator(3, ALL_POSITIONS, with_thresholds=False)
    for chunk in maps.split(2):
        tally.update(chunk)
    statistics, whole = tally.compute(0.1), tally_of(maps).compute(0.1)
    assert torch.equal(statistics.mean, whole.mean)
    assert torch.equal(statistics.largest, whole.largest)
    assert statistics.threshold.isinf().all()
    with pytest.raises(DataError, match="not finite"):
        tally.update(maps.clone().fill_(math.nan))
