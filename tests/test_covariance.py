from __future__ import annotations

import pytest
import torch

from secateur.runtime.errors import DataError
from secateur.scoring.covariance import LEVELS, SecondMoments, quantization_unit, quantize
from secateur.scoring.thresholds import ActivationStatistics


def test_moments_are_those_of_all_rows(generator: torch.Generator) -> None:
    rows = torch.randn(40, 3, generator=generator) * torch.tensor([1.0, 10.0, 0.1])
    zero = torch.zeros(3)
    unit = quantization_unit(ActivationStatistics(zero, zero, rows.abs().amax(0), len(rows)))
    moments = SecondMoments(3)
    for chunk in rows.split(7):
        moments.update(quantize(chunk, unit, "conv"))
    exact = rows.double()
    torch.testing.assert_close(moments.raw(unit), exact.T @ exact / 40, rtol=1e-3, atol=1e-3)
    expected = torch.cov(exact.T, correction=0)
    torch.testing.assert_close(moments.covariance(unit), expected, rtol=1e-3, atol=1e-3)


def test_a_weight_counts_a_row_several_times(generator: torch.Generator) -> None:
    rows = torch.randint(-LEVELS, LEVELS, (20, 4), generator=generator).float()
    weights = torch.randint(0, 4, (20,), generator=generator)
    weighted, repeated = SecondMoments(4), SecondMoments(4)
    weighted.update(rows, weights.float())
    repeated.update(rows.repeat_interleave(weights, 0))
    assert [sums.tolist() for sums in weighted.state()] == [
        sums.tolist() for sums in repeated.state()
    ]


def test_the_order_of_rows_does_not_matter(generator: torch.Generator) -> None:
    rows = torch.randint(-LEVELS, LEVELS, (1000, 4), generator=generator).float()
    one, other = SecondMoments(4), SecondMoments(4)
    one.update(rows)
    for chunk in rows.flip(0).split(13):
        other.update(chunk)
    for sums, its in zip(one.state(), other.state(), strict=True):
        assert torch.equal(sums, its)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e30])
def test_values_keep_their_size_whatever_it_is(size: float) -> None:
    zero = torch.zeros(1)
    unit = quantization_unit(ActivationStatistics(zero, zero, torch.tensor([size]), 1))
    values = torch.tensor([[1.0], [-0.5], [0.25]]) * size
    whole = quantize(values, unit, "conv")
    torch.testing.assert_close(whole * unit, values, rtol=1e-3, atol=0)
    assert whole.abs().max() <= LEVELS


def test_nan_is_refused() -> None:
    rows = torch.tensor([[1.0, float("nan")]])
    with pytest.raises(DataError, match="'conv1' holds values that are not finite"):
        quantize(rows, torch.ones(2), "conv1")


def test_a_part_of_the_rows_is_taken_out_and_measured_about_the_mean_of_the_others() -> None:
    rows = torch.randint(-50, 50, (9, 3), generator=torch.Generator().manual_seed(2)).float()
    unit = torch.tensor([0.5, 1.0, 2.0])
    together, part = SecondMoments(3), SecondMoments(3)
    assert part.is_empty
    together.update(rows)
    part.update(rows[6:])
    rest = together.without(part)
    values = rows * unit.double()
    assert not part.is_empty
    torch.testing.assert_close(rest.mean(unit), values[:6].mean(0))
    away = values[6:] - values[:6].mean(0)
    torch.testing.assert_close(part.about(rest.mean(unit), unit), away.T @ away / 3)
