"""Sums of real numbers that are the same to the last bit in whatever order they are added."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.errors import DataError

COARSE = 2.0**10
FINE = 2.0**50
LARGEST = 2.0**40
"""A number must be smaller than this in size; then 2^12 of them can be added without overflow."""


class ExactSum:
    """Adds numbers up as integers: multiples of 2^-10, and of 2^-50 for what is left of each.

    So every number is rounded to a multiple of 2^-50, and the sum of the rounded ones is exact.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.limbs: Int[Tensor, "2 ..."] = torch.zeros(2, *shape, dtype=torch.int64)
        """The tally: sums of sums are sums of limbs."""

    def add(self, values: Float[Tensor, "image ..."]) -> None:
        """Adds float64 values of several images; raises `DataError` where one is not finite."""
        if not bool((values.abs() < LARGEST).all()):
            raise DataError("a feature map holds values that are not finite or beyond 2^40")
        coarse = (values * COARSE).round()
        fine = ((values - coarse / COARSE) * FINE).round()
        self.limbs[0] += coarse.long().sum(0)
        self.limbs[1] += fine.long().sum(0)

    def value(self) -> Float[Tensor, "..."]:
        """The sum, in float64."""
        return self.limbs[0].double() / COARSE + self.limbs[1].double() / FINE
