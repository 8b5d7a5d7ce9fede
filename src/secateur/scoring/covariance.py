"""Second moments, means and covariance of activations, bit-equal in any order of the images.

Activations are rounded to whole multiples of a unit, so products are whole numbers and their sums
are exact in float64.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.runtime.device import CPU
from secateur.runtime.errors import DataError
from secateur.scoring.thresholds import ActivationStatistics

LEVELS = 2**14
"""The largest whole number that an activation is rounded to; larger ones are clipped. Sums of
products are exact up to 2^25 rows, a row of weight w counted w times."""


def quantization_unit(statistics: ActivationStatistics) -> Float[Tensor, "filter"]:
    """Return each filter's unit: `LEVELS` units are twice its largest activation."""
    largest = statistics.largest.double().clamp_min(torch.finfo(torch.float32).tiny)
    return (2 * largest / LEVELS).float()


def quantize(
    values: Float[Tensor, "*row value"], unit: Float[Tensor, "value"], tap: str
) -> Float[Tensor, "*row value"]:
    """Return a tap's values as whole multiples of their units.

    Raises `DataError` that names the tap if a value is not finite.
    """
    whole = (values.float() / unit).round_().clamp_(-LEVELS, LEVELS)
    if not bool(whole.isfinite().all()):
        raise DataError(f"a feature map of {tap!r} holds values that are not finite")
    return whole


class SecondMoments:
    """Sums of products of values, in units, over rows (positions of images)."""

    def __init__(self, values: int, device: torch.device = CPU) -> None:
        # The last row and column belong to a constant 1: they hold the sums and the count.
        self._sums = torch.zeros(values + 1, values + 1, dtype=torch.float64, device=device)

    def update(
        self, rows: Float[Tensor, "row value"], weights: Float[Tensor, "row"] | None = None
    ) -> None:
        """Add rows of whole numbers, each as often as its weight says."""
        if weights is not None:
            rows, weights = rows[weights > 0], weights[weights > 0]
        values = torch.cat([rows.double(), rows.new_ones(len(rows), 1, dtype=torch.float64)], 1)
        weighted = values if weights is None else values * weights.double()[:, None]
        self._sums.addmm_(weighted.T, values)

    def without(self, part: SecondMoments) -> SecondMoments:
        """Return the sums without a part of the rows."""
        rest = SecondMoments(0)
        rest._sums = self._sums - part._sums
        return rest

    def state(self) -> Iterable[Tensor]:
        """Return the sums over images; see `Observer.state`."""
        return (self._sums,)

    @property
    def is_empty(self) -> bool:
        """Whether no row was added."""
        return not bool(self._sums[-1, -1] > 0)

    def raw(self, unit: Float[Tensor, "value"]) -> Float[Tensor, "value value"]:
        """Return the mean products of values, in their original scale."""
        return self._sums[:-1, :-1] / self._count * unit.double().outer(unit.double())

    def covariance(
        self, unit: Float[Tensor, "value"], part: slice = slice(None)
    ) -> Float[Tensor, "part part"]:
        """Return the covariance of values, or of a part of them (biased), in their scale."""
        totals, units = self._sums[-1, :-1][part], unit.double()[part] / self._count.sqrt()
        products = self._sums[:-1, :-1][part, part]
        covariance = products.addr(totals, totals / self._count, alpha=-1)
        return covariance.mul_(units[:, None]).mul_(units)

    def about(
        self, mean: Float[Tensor, "value"], unit: Float[Tensor, "value"]
    ) -> Float[Tensor, "value value"]:
        """Return the mean products of values less another mean than their own."""
        centre = self.mean(unit)
        products = self.raw(unit)
        return products.addr_(centre, mean, alpha=-1).addr_(mean, mean - centre)

    def mean(self, unit: Float[Tensor, "value"]) -> Float[Tensor, "value"]:
        """Return the mean values, in their original scale."""
        return self._sums[-1, :-1] / self._count * unit.double()

    @property
    def _count(self) -> Tensor:
        return self._sums[-1, -1].clamp_min(1)
