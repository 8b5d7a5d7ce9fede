"""What is usual for each filter: its mean and its top quantile, from counts that add up.

The threshold T_c is the value that filter c exceeds at a share q of all positions of all images
(Bau et al., Network Dissection, CVPR 2017, section 2.2).

Quantiles come from a histogram whose bins are as wide as their values are large, the idea of
DDSketch (Masson, Rim, Lee, VLDB 2019, section 2): a bin for each value of the exponent and the
first bits of the mantissa of a float32. Counts are integers, so batches, shards and processes give
the same result to the last bit in whatever order they are added.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.errors import DataError
from secateur.graph.patches import even_step
from secateur.runtime import distributed
from secateur.scoring.exact_sum import ExactSum

MANTISSA_BITS = 6
"""A bin is at most 1/64 of its values wide."""
OCTAVES = 11
"""Of the exponents that have bins of their own, the filter's largest comes first: so values smaller
than 2^-11 of its largest in size are counted as zero, and none that is 2^-10 of it or more."""
_BINS = OCTAVES << MANTISSA_BITS
_SHIFT = 23 - MANTISSA_BITS
_ONE_OCTAVE = 1 << MANTISSA_BITS


@dataclass(frozen=True, eq=False)
class ActivationStatistics:
    """Each filter's mean, threshold and largest size."""

    mean: Float[Tensor, "filter"]
    threshold: Float[Tensor, "filter"]
    """Infinite where nobody asked for it: nothing is above it."""
    largest: Float[Tensor, "filter"]
    """No value that was looked at is larger in size; at most twice the largest one."""


class StatisticsAccumulator:
    """Counts each filter's activations, batch by batch."""

    def __init__(self, filters: int, positions: int, *, with_thresholds: bool = True) -> None:
        """Looks at `positions` positions of each map, evenly spaced, or at all where fewer."""
        self._positions = positions
        self._with_thresholds = with_thresholds
        self._images = torch.zeros((), dtype=torch.int64)
        self._mean = ExactSum((filters,))
        self._largest = torch.full((filters,), -torch.inf)
        self._octave = torch.zeros(filters, dtype=torch.int64)
        """The exponent of the largest size seen, as float32 stores it."""
        self._counts = torch.zeros(filters, 2 * _BINS + 1, dtype=torch.int32)
        """`[filter, bin]`: from the most negative to the largest; the middle one holds zero."""

    def update(self, maps: Float[Tensor, "image filter h w"]) -> None:
        """Takes in the feature maps of a batch; raises `DataError` where one is not finite."""
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
        places += torch.arange(len(values), dtype=torch.int32)[:, None] * width
        found = places.flatten().bincount(minlength=self._counts.numel())
        self._counts += found.reshape(self._counts.shape)

    def _widen(self, octave: Tensor) -> None:
        """Moves the bins of filters that have met larger values; small ones then count as zero."""
        grown = (octave - self._octave).clamp(0, OCTAVES)
        rows = grown.nonzero()[:, 0]
        if len(rows) and bool(self._counts.any()):
            counts = self._counts[rows]
            by = grown[rows, None] << MANTISSA_BITS
            place = torch.arange(-_BINS, _BINS + 1)  # signed, 0 is zero
            source = place + place.sign() * by  # [filter, bin]
            moved = counts.gather(1, (source + _BINS).clamp(0, 2 * _BINS))
            moved *= source.abs() <= _BINS
            moved[:, _BINS] = (counts * (place.abs() <= by)).sum(1)
            self._counts[rows] = moved
        self._octave = torch.maximum(self._octave, octave)

    def merge(self) -> None:
        """Adds up what all processes have counted."""
        octave = self._octave.clone()
        distributed.all_reduce_max([octave, self._largest])
        self._widen(octave)
        distributed.all_reduce_sum([self._images, self._mean.limbs, self._counts])

    def compute(self, quantile: float) -> ActivationStatistics:
        """Means, and thresholds if asked for: exceeded by a share `quantile` of what was looked at.

        A threshold is never below the exact quantile of what was looked at, and above it by at
        most 1/64 of its size or, where it is smaller than 2^-10 of the filter's largest activation,
        by 2^-9 of that: values so small, of both signs, are one bin. The exact one is the largest
        value that at least the share q reach. A share q of n independent values is itself known to
        within about sqrt(q (1 - q) / n).
        """
        mean = (self._mean.compute() / int(self._images)).float()
        bound = ((self._octave + 1) << 23).int().view(torch.float32)
        if not self._with_thresholds:
            return ActivationStatistics(mean, torch.full_like(mean, torch.inf), bound)
        total = int(self._counts[0].sum())
        rank = max(1, round(quantile * total))
        reached = self._counts.flip(1).cumsum(1, dtype=torch.int64) >= rank
        place = (2 * _BINS - reached.int().argmax(1)) - _BINS  # signed, 0 is zero
        floor = ((self._octave + 1) << MANTISSA_BITS) - _BINS
        # The edge further from -inf of a bin: above a positive one, below the size of a negative.
        above = (floor + place.abs()) << _SHIFT
        below = (floor + place.abs() - 1) << _SHIFT
        edge = torch.where(place > 0, above, below).clamp_min(0).int().view(torch.float32)
        smallest = (floor.clamp_min(0) << _SHIFT).int().view(torch.float32)
        threshold = torch.where(place > 0, edge, torch.where(place < 0, -edge, smallest))
        return ActivationStatistics(mean, torch.minimum(threshold, self._largest), bound)
