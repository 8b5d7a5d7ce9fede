"""Sums of real numbers that are the same to the last bit in whatever order they are added."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.errors import DataError

LIMB_BITS = 40
UNITS = (2.0**40, 1.0, 2.0**-40, 2.0**-80)
FINE = 1 / UNITS[-1]
LARGEST = 2.0**79
"""A number must be smaller than this in size; then 2^23 of them can be added without overflow."""


class ExactSum:
    """Adds numbers up as integers: multiples of 2^40, and of 2^0, 2^-40, 2^-80 for what is left.

    So every number is rounded to a multiple of 2^-80, and the sum of the rounded ones is exact.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.limbs: Int[Tensor, "4 ..."] = torch.zeros(len(UNITS), *shape, dtype=torch.int64)
        """The tally: sums of sums are sums of limbs."""

    def update(self, values: Float[Tensor, "image ..."]) -> None:
        """Adds float64 values of several images; raises `DataError` where one is not finite."""
        if not bool((values.abs() < LARGEST).all()):
            raise DataError("a feature map holds values that are not finite or beyond 2^79")
        for limb, unit in zip(self.limbs, UNITS, strict=True):
            whole = (values / unit).round()  # at most 2^39 in size
            values = values - whole * unit
            limb += whole.long().sum(0)

    def compute(self) -> Float[Tensor, "..."]:
        """The sum, in float64, to within one rounding more than there must be.

        Equal sums have equal values, whatever limbs they are held in.
        """
        limbs = list(self.limbs)
        for place in range(len(limbs) - 1, 0, -1):
            carry = (limbs[place] + (1 << (LIMB_BITS - 1))) >> LIMB_BITS
            limbs[place] = limbs[place] - (carry << LIMB_BITS)
            limbs[place - 1] = limbs[place - 1] + carry
        total = torch.zeros(limbs[0].shape, dtype=torch.float64)
        for limb, unit in zip(reversed(limbs), reversed(UNITS), strict=True):
            total += limb.double() * unit
        return total
