"""Criteria from what a filter's activations are like, filter by filter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.errors import DataError
from secateur.scoring.criteria import FeatureBatch, Kernels, Need
from secateur.scoring.exact_sum import ExactSum

BINS_PER_DOUBLING = 4
"""Bins in which the distance from the usual mean, plus an eighth of that mean, doubles."""
DOUBLINGS = 16
"""Beyond so many on either side all distances share the last bin."""
RANK_IMAGES = 64
"""Images whose ranks are computed: they hardly differ between images (Lin et al., 2020)."""


class ActivationMean:
    """Mean size of a filter's activation over all positions of all images.

    (Molchanov et al., ICLR 2017, section 2.2, "activation"; of its size, since without a rectifier
    not every activation is positive.)
    """

    needs: frozenset[Need] = frozenset({"maps"})

    def __init__(self) -> None:
        self._means: dict[str, _ImageMeans] = {}

    def reset(self, parts: Mapping[str, Kernels]) -> None:
        """Makes room for a sum a filter."""
        self._means = {part: _ImageMeans(1, kernels.filters) for part, kernels in parts.items()}

    def update(self, sight: FeatureBatch) -> None:
        """Adds up each image's mean."""
        self._means[sight.tap].update(sight.maps.float().abs().mean(dim=(2, 3)))

    def state(self) -> Iterable[Tensor]:
        """See `Observer.state`."""
        return (tally for means in self._means.values() for tally in means.state())

    def compute(self, part: str) -> Float[Tensor, "filter"]:
        """The means."""
        return self._means[part].compute()[0]


class ActivationStd:
    """Standard deviation of a filter's activation over all positions of all images.

    (Polyak and Wolf, IEEE Access 2015, prune by variance; biased estimate.)
    """

    needs: frozenset[Need] = frozenset({"maps"})

    def __init__(self) -> None:
        self._means: dict[str, _ImageMeans] = {}

    def reset(self, parts: Mapping[str, Kernels]) -> None:
        """Makes room for three sums a filter."""
        self._means = {part: _ImageMeans(3, kernels.filters) for part, kernels in parts.items()}

    def update(self, sight: FeatureBatch) -> None:
        """Adds up each image's mean, its square, and the variance within the image."""
        maps = sight.maps.float()
        near = maps.mean(dim=(2, 3), keepdim=True)
        # Around the rounded mean nothing cancels; `torch.var_mean` is several times as slow here.
        away = maps - near
        shift = away.mean(dim=(2, 3)).double()  # [image, filter]
        variance = away.square_().mean(dim=(2, 3)).double() - shift.square()
        mean = near[:, :, 0, 0].double() + shift
        self._means[sight.tap].update(mean, mean.square(), variance.clamp_min(0))

    def state(self) -> Iterable[Tensor]:
        """See `Observer.state`."""
        return (tally for means in self._means.values() for tally in means.state())

    def compute(self, part: str) -> Float[Tensor, "filter"]:
        """The standard deviations."""
        mean, square, within = self._means[part].compute().unbind()
        return (within + (square - mean.square()).clamp_min(0)).sqrt()


class _ImageMeans:
    """Means over images of some numbers for each filter."""

    def __init__(self, numbers: int, filters: int) -> None:
        self._images = torch.zeros((), dtype=torch.int64)
        self._total = ExactSum((numbers, filters))

    def update(self, *values: Float[Tensor, "image filter"]) -> None:
        """Takes in a batch."""
        self._images += len(values[0])
        self._total.update(torch.stack([each.double() for each in values], 1))

    def state(self) -> Iterable[Tensor]:
        """The sums."""
        return (self._images, self._total.limbs)

    def compute(self) -> Float[Tensor, "number filter"]:
        """The means, in float64."""
        return self._total.compute().div(int(self._images))


class Apoz:
    """Share of positions where a filter is above zero: one minus the average percentage of zeros.

    (Hu et al., Network Trimming, 2016, eq. 1. Where no rectifier follows, what is not positive
    counts as zero.)
    """

    needs: frozenset[Need] = frozenset({"maps"})

    def __init__(self) -> None:
        self._tallies: dict[str, Tensor] = {}

    def reset(self, parts: Mapping[str, Kernels]) -> None:
        """Makes room for two counts a filter."""
        self._tallies = {
            part: torch.zeros(2, kernels.filters, dtype=torch.int64)
            for part, kernels in parts.items()
        }

    def update(self, sight: FeatureBatch) -> None:
        """Counts positions."""
        maps = sight.maps
        # As floats, which are summed several times as fast as booleans; exact up to 2^24 positions.
        is_positive = torch.gt(maps, 0, out=torch.empty_like(maps, dtype=torch.float32))
        positive = is_positive.sum(dim=(2, 3))  # [image, filter]
        self._tallies[sight.tap][0] += positive.long().sum(0)
        self._tallies[sight.tap][1] += len(positive) * maps.shape[2:].numel()

    def state(self) -> Iterable[Tensor]:
        """See `Observer.state`."""
        return self._tallies.values()

    def compute(self, part: str) -> Float[Tensor, "filter"]:
        """The shares."""
        positive, count = self._tallies[part].double().unbind()
        return positive / count


class ActivationEntropy:
    """Entropy over images of a filter's pooled activation (Luo and Wu, arXiv:1706.05791, 2017).

    The paper bins between the smallest and the largest value that occur; here bins are set before
    the pass, so that counts add up. They lie around the filter's usual mean, evenly near it and
    ever wider further off (`_bins`): so they suit one that varies little as well as one whose
    values of either sign cancel in the mean.
    """

    needs: frozenset[Need] = frozenset({"maps", "usual"})

    def __init__(self) -> None:
        self._counts: dict[str, Tensor] = {}

    def reset(self, parts: Mapping[str, Kernels]) -> None:
        """Makes room for the bins."""
        self._counts = {
            part: torch.zeros(kernels.filters, 2 * _SIDE + 1, dtype=torch.int64)
            for part, kernels in parts.items()
        }

    def update(self, sight: FeatureBatch) -> None:
        """Puts each image's pooled activation into its bin."""
        assert sight.statistics is not None
        pooled = sight.maps.float().mean(dim=(2, 3))  # [image, filter]
        bins = _bins(pooled, sight.statistics.mean)
        counts = self._counts[sight.tap]
        counts.scatter_add_(1, bins.T.contiguous(), torch.ones_like(bins.T.contiguous()))

    def state(self) -> Iterable[Tensor]:
        """See `Observer.state`."""
        return self._counts.values()

    def compute(self, part: str) -> Float[Tensor, "filter"]:
        """The entropies, in nats."""
        counts = self._counts[part].double()
        entropy: Tensor = torch.special.entr(counts / counts.sum(1, keepdim=True)).sum(1)
        return entropy


_SIDE = BINS_PER_DOUBLING * DOUBLINGS


def _bins(
    pooled: Float[Tensor, "image filter"], mean: Float[Tensor, "filter"]
) -> Int[Tensor, "image filter"]:
    """The bin of each value: the middle one holds what is within about 1 % of the mean.

    With d the distance from the mean m, bins are steps of log2(1 + 8 |d| / |m|) on either side.
    """
    away = (pooled - mean).double()
    unit = mean.double().abs().clamp_min(torch.finfo(torch.float32).tiny) / 8
    steps = (BINS_PER_DOUBLING * torch.log2(1 + away.abs() / unit)).round().clamp(max=_SIDE)
    return (away.sign() * steps).long() + _SIDE


class MapRank:
    """Mean rank of a filter's feature map as a matrix (HRank, Lin et al., CVPR 2020)."""

    needs: frozenset[Need] = frozenset({"maps"})

    def __init__(self) -> None:
        self._ranks: dict[str, Tensor] = {}

    def reset(self, parts: Mapping[str, Kernels]) -> None:
        """Makes room for a sum a filter."""
        self._ranks = {
            part: torch.zeros(kernels.filters, dtype=torch.int64) for part, kernels in parts.items()
        }

    def update(self, sight: FeatureBatch) -> None:
        """Adds up the ranks in the first `RANK_IMAGES` images of the calibration set."""
        for image in (sight.indices < RANK_IMAGES).nonzero()[:, 0].tolist():
            maps = sight.maps[image].float()
            if not bool(maps.isfinite().all()):
                raise DataError(f"a feature map of {sight.tap!r} holds values that are not finite")
            self._ranks[sight.tap] += torch.linalg.matrix_rank(maps)

    def state(self) -> Iterable[Tensor]:
        """See `Observer.state`."""
        return self._ranks.values()

    def compute(self, part: str) -> Float[Tensor, "filter"]:
        """The summed ranks."""
        return self._ranks[part].double()
