from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.runtime.errors import DataError
from secateur.scoring.exact_sum import FINE, ExactSum

NUMBERS = st.lists(
    st.floats(-1e9, 1e9, allow_nan=False, allow_subnormal=False), min_size=1, max_size=20
)


@settings(deadline=None)
@given(numbers=NUMBERS, cut=st.integers(0, 20), seed=st.integers(0, 2**31))
def test_order_and_parts_do_not_matter(numbers: list[float], cut: int, seed: int) -> None:
    values = torch.tensor(numbers, dtype=torch.float64)
    whole = ExactSum(())
    whole.update(values)
    shuffled = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))]
    parts = ExactSum(())
    for part in (shuffled[:cut], shuffled[cut:]):
        other = ExactSum(())
        other.update(part)
        parts.limbs += other.limbs
    assert torch.equal(parts.limbs, whole.limbs)


@settings(deadline=None)
@given(numbers=NUMBERS)
def test_the_sum_is_that_of_the_rounded_numbers(numbers: list[float]) -> None:
    total = ExactSum((1,))
    total.update(torch.tensor(numbers, dtype=torch.float64)[:, None])
    exact = float(sum(Fraction(number) for number in numbers))
    assert float(total.compute()[0]) == pytest.approx(exact, rel=1e-15, abs=len(numbers) / FINE)


def test_small_numbers_count_and_many_large_ones_do_not_overflow() -> None:
    """Squared changes of a loss near zero; squares of large activations."""
    total = ExactSum(())
    total.update(torch.full((1000,), 2e-10, dtype=torch.float64).square())
    assert float(total.compute()) == pytest.approx(4e-17, rel=1e-4)
    for _ in range(40):
        total.update(torch.full((1000,), 2.0**78, dtype=torch.float64))
    assert float(total.compute()) == 40_000 * 2.0**78


def test_equal_sums_have_equal_values() -> None:
    one, other = ExactSum(()), ExactSum(())
    one.update(torch.tensor([0.375, 0.375, 2.0**-70], dtype=torch.float64))
    other.update(torch.tensor([2.0**-70, 0.75], dtype=torch.float64))
    assert not torch.equal(one.limbs, other.limbs)
    assert torch.equal(one.compute(), other.compute())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e30])
def test_nan_and_large_numbers_are_refused(bad: float) -> None:
    with pytest.raises(DataError, match="not finite or beyond"):
        ExactSum(()).update(torch.tensor([1.0, bad], dtype=torch.float64))
