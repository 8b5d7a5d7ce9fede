"""Second moments of activations, the same to the last bit in whatever order they are added up.

Activations are rounded to whole multiples of a unit, so that products are whole numbers and their
sums exact in float64.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.errors import DataError
from secateur.scoring.thresholds import ActivationStatistics

LEVELS = 2**14
"""Whole numbers that activations are brought to: at most so large, and cut off beyond. Sums of
their products are exact up to 2^25 rows, each counted as often as its weight says."""


def quantization_unit(usual: ActivationStatistics) -> Float[Tensor, "filter"]:
    """What each filter's activations are rounded to: `LEVELS` of it are twice its largest one."""
    largest = usual.largest.double().clamp_min(torch.finfo(torch.float32).tiny)
    return (2 * largest / LEVELS).float()


def quantize(
    values: Float[Tensor, "*row value"], unit: Float[Tensor, "value"], tap: str
) -> Float[Tensor, "*row value"]:
    """Values of a part as whole multiples of units; raises `DataError` where one is no number."""
    whole = (values.float() / unit).round_().clamp_(-LEVELS, LEVELS)
    if not bool(whole.isfinite().all()):
        raise DataError(f"a feature map of {tap!r} holds values that are not finite")
    return whole


class SecondMoments:
    """Sums of products of values that were seen together."""

    def __init__(self, values: int) -> None:
        # The last row and column are those of a constant 1: sums and the count.
        self._sums = torch.zeros(values + 1, values + 1, dtype=torch.float64)

    def update(
        self, rows: Float[Tensor, "row value"], weights: Float[Tensor, "row"] | None = None
    ) -> None:
        """Adds whole numbers, each row as often as its weight says."""
        if weights is not None:
            rows, weights = rows[weights > 0], weights[weights > 0]
        values = torch.cat([rows.double(), rows.new_ones(len(rows), 1, dtype=torch.float64)], 1)
        weighted = values if weights is None else values * weights.double()[:, None]
        self._sums.addmm_(weighted.T, values)

    def state(self) -> Iterable[Tensor]:
        """See `Observer.state`."""
        return (self._sums,)

    def raw(self, unit: Float[Tensor, "value"]) -> Float[Tensor, "value value"]:
        """Mean products, in the measure that values had before they were counted in units."""
        return self._sums[:-1, :-1] / self._count * unit.double().outer(unit.double())

    def covariance(self, unit: Float[Tensor, "value"]) -> Float[Tensor, "value value"]:
        """The same around the means."""
        mean = self.mean(unit)
        return self.raw(unit) - mean.outer(mean)

    def mean(self, unit: Float[Tensor, "value"]) -> Float[Tensor, "value"]:
        """Mean values, in the same measure."""
        return self._sums[-1, :-1] / self._count * unit.double()

    @property
    def _count(self) -> Tensor:
        return self._sums[-1, -1].clamp_min(1)
