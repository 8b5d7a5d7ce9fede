"""Activation statistics of each filter: its mean and its threshold, a top quantile.

The threshold T_c is the value that filter c exceeds at a fraction q of all positions of all images
(Bau et al., Network Dissection, CVPR 2017, section 2.2).

Quantiles come from a histogram whose bins grow with their values, the idea of DDSketch (Masson,
Rim, Lee, VLDB 2019, section 2): one bin for each value of the exponent and the first bits of the
mantissa of a float32. Counts are integers, so the result is bit-equal in any order of batches,
shards and processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.graph.patches import even_step
from secateur.runtime import distributed
from secateur.runtime.device import CPU
from secateur.runtime.errors import DataError
from secateur.scoring.exact_sum import ExactSum

MANTISSA_BITS = 6
"""A bin is at most 1/64 of its values wide."""
OCTAVES = 11
"""Exponents with bins of their own, from the filter's largest down. So values below 2^-11 of its
largest in size count as zero, and none from 2^-10 of it on does."""
_BINS = OCTAVES << MANTISSA_BITS
_SHIFT = 23 - MANTISSA_BITS
_ONE_OCTAVE = 1 << MANTISSA_BITS


@dataclass(frozen=True, eq=False)
class ActivationStatistics:
    """Each filter's mean, threshold and largest absolute value."""

    mean: Float[Tensor, "filter"]
    threshold: Float[Tensor, "filter"]
    """Infinite, so that nothing is above it, if no observer needs thresholds."""
    largest: Float[Tensor, "filter"]
    """Bound on the absolute values of the sample, at most twice the largest of them."""
    images: int
    """Number of calibration images, not of the sample alone."""


class StatisticsAccumulator:
    """Accumulates each filter's activation statistics, batch by batch."""

    def __init__(
        self,
        filters: int,
        positions: int,
        *,
        with_thresholds: bool = True,
        device: torch.device = CPU,
    ) -> None:
        """Sample `positions` positions of each map, evenly spaced, or all if there are fewer.

        The maps are on `device`, and so are the statistics.
        """
        self.device = device
        self._positions = positions
        self._with_thresholds = with_thresholds
        self._images = torch.zeros((), dtype=torch.int64)
        self._mean = ExactSum((filters,), device)
        self._largest = torch.full((filters,), -torch.inf, device=device)
        self._octave = torch.zeros(filters, dtype=torch.int64, device=device)
        """The exponent of the largest absolute value so far, as float32 stores it."""
        self._counts = torch.zeros(filters, 2 * _BINS + 1, dtype=torch.int32, device=device)
        """`[filter, bin]`, from the most negative to the largest; the middle bin holds zero."""

    def update(self, maps: Float[Tensor, "image filter h w"]) -> None:
        """Add the feature maps of a batch; raises `DataError` if a value is not finite."""
        self._images += len(maps)
        self._mean.update(maps.float().mean(dim=(2, 3)).double())
        values = maps.flatten(2)
        step = even_step(maps.shape[2], maps.shape[3], self._positions)
        values = values[:, :, ::step].movedim(1, 0).flatten(1).float()  # [filter, value]
        self._largest = torch.maximum(self._largest, values.amax(1))
        keys = values.abs().view(torch.int32) >> _SHIFT
        octave = (keys.amax(1) >> MANTISSA_BITS).long()
        if int(octave.max()) == 255:
            raise DataError("a feature map holds values that are not finite")
        self._widen(octave)
        if not self._with_thresholds:
            return
        floor = ((self._octave + 1) << MANTISSA_BITS) - _BINS
        places = (keys - floor.int()[:, None] + 1).clamp_(0, _BINS)
        places = torch.where(values < 0, -places, places).add_(_BINS)
        width = self._counts.shape[1]
        rows = torch.arange(len(values), dtype=torch.int32, device=values.device)
        places += rows[:, None] * width
        counts = places.flatten().bincount(minlength=self._counts.numel())
        self._counts += counts.reshape(self._counts.shape)

    def _widen(self, octave: Tensor) -> None:
        """Shift the bins of filters with new largest values; the smallest then count as zero."""
        grown = (octave - self._octave).clamp(0, OCTAVES)
        rows = grown.nonzero()[:, 0]
        if len(rows) and bool(self._counts.any()):
            counts = self._counts[rows]
            by = grown[rows, None] << MANTISSA_BITS
            place = torch.arange(-_BINS, _BINS + 1, device=grown.device)  # signed, 0 is zero
            source = place + place.sign() * by  # [filter, bin]
            moved = counts.gather(1, (source + _BINS).clamp(0, 2 * _BINS))
            moved *= source.abs() <= _BINS
            moved[:, _BINS] = (counts * (place.abs() <= by)).sum(1)
            self._counts[rows] = moved
        self._octave = torch.maximum(self._octave, octave)

    def merge(self) -> None:
        """Add up the state over all processes."""
        octave = self._octave.clone()
        distributed.all_reduce_max([octave, self._largest])
        self._widen(octave)
        distributed.all_reduce_sum([self._images, self._mean.limbs, self._counts])

    def compute(self, quantile: float, images: int | None = None) -> ActivationStatistics:
        """Return the statistics, with thresholds that a fraction `quantile` of the sample exceeds.

        `images` is the number of calibration images, by default that of the sample.

        A threshold is never below the exact quantile of the sample, and above it by at most 1/64 of
        its size or, if it is smaller than 2^-10 of the filter's largest activation, by 2^-9 of
        that: such small values, of both signs, share one bin. The exact quantile is the largest
        value that at least the fraction q reaches. For n independent values q itself is known to
        within about sqrt(q (1 - q) / n).
        """
        images = images or int(self._images)
        mean = (self._mean.compute() / int(self._images)).float().to(self._octave.device)
        bound = ((self._octave + 1) << 23).int().view(torch.float32)
        if not self._with_thresholds:
            return ActivationStatistics(mean, torch.full_like(mean, torch.inf), bound, images)
        total = int(self._counts[0].sum())
        rank = max(1, round(quantile * total))
        reached = self._counts.flip(1).cumsum(1, dtype=torch.int64) >= rank
        place = (2 * _BINS - reached.int().argmax(1)) - _BINS  # signed, 0 is zero
        floor = ((self._octave + 1) << MANTISSA_BITS) - _BINS
        # The upper edge of a bin: of a negative bin the smaller absolute value.
        above = (floor + place.abs()) << _SHIFT
        below = (floor + place.abs() - 1) << _SHIFT
        edge = torch.where(place > 0, above, below).clamp_min(0).int().view(torch.float32)
        smallest = (floor.clamp_min(0) << _SHIFT).int().view(torch.float32)
        threshold = torch.where(place > 0, edge, torch.where(place < 0, -edge, smallest))
        return ActivationStatistics(mean, torch.minimum(threshold, self._largest), bound, images)
