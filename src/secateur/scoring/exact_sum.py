"""Sums of real numbers, bit-equal in any order of the numbers."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.runtime.device import CPU
from secateur.runtime.errors import DataError

LIMB_BITS = 40
UNITS = (2.0**40, 1.0, 2.0**-40, 2.0**-80)
FINE = 1 / UNITS[-1]
LARGEST = 2.0**79
"""Bound on a number's absolute value: 2^23 such numbers can be added without overflow."""


class ExactSum:
    """A sum held as integers: multiples of 2^40, and of 2^0, 2^-40, 2^-80 for the remainders.

    Every number is rounded to a multiple of 2^-80, and the sum of the rounded numbers is exact.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device = CPU) -> None:
        self.limbs: Int[Tensor, "4 ..."] = torch.zeros(
            len(UNITS), *shape, dtype=torch.int64, device=device
        )
        """The state: add the limbs of two sums to add the sums."""

    def update(self, values: Float[Tensor, "image ..."]) -> None:
        """Add float64 values over their first axis; raises `DataError` if one isn't finite."""
        if not bool((values.abs() < LARGEST).all()):
            raise DataError("a feature map holds values that are not finite or beyond 2^79")
        for limb, unit in zip(self.limbs, UNITS, strict=True):
            whole = (values / unit).round()  # at most 2^39 in size
            values = values - whole * unit
            limb += whole.long().sum(0)

    def compute(self) -> Float[Tensor, "..."]:
        """Return the sum in float64, rounded once more than the exact sum would be, on the CPU.

        Equal sums give equal values, whichever limbs hold them.
        """
        limbs = list(self.limbs.cpu())
        for place in range(len(limbs) - 1, 0, -1):
            carry = (limbs[place] + (1 << (LIMB_BITS - 1))) >> LIMB_BITS
            limbs[place] = limbs[place] - (carry << LIMB_BITS)
            limbs[place - 1] = limbs[place - 1] + carry
        total = torch.zeros(limbs[0].shape, dtype=torch.float64)
        for limb, unit in zip(reversed(limbs), reversed(UNITS), strict=True):
            total += limb.double() * unit
        return total
