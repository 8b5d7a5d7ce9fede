"""Criteria from the statistics of each filter's activations: size, spread, zeros, entropy, rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.graph.taps import Kernels
from secateur.runtime.errors import DataError
from secateur.scoring.criteria import FeatureBatch, Need
from secateur.scoring.exact_sum import ExactSum

BINS_PER_DOUBLING = 4
"""Bins over which the distance from the mean, plus an eighth of that mean, doubles."""
DOUBLINGS = 16
"""Beyond this many doublings all distances share the last bin of their side."""
RANK_IMAGES = 64
"""Images whose ranks are computed: ranks hardly differ between images (Lin et al., 2020)."""


class ActivationMean:
    """Mean absolute activation of a filter over all positions of all images.

    Molchanov et al., ICLR 2017, section 2.2, "activation"; absolute, since without a rectifier not
    every activation is positive.
    """

    needs: frozenset[Need] = frozenset({"maps"})

    def __init__(self) -> None:
        self._means: dict[str, _ImageMeans] = {}

    def reset(self, taps: Mapping[str, Kernels]) -> None:
        """Start anew; see `Observer.reset`."""
        self._means = {tap: _ImageMeans(1, kernels) for tap, kernels in taps.items()}

    def update(self, features: FeatureBatch) -> None:
        """Add each image's mean."""
        self._means[features.tap].update(features.maps.float().abs().mean(dim=(2, 3)))

    def state(self) -> Iterable[Tensor]:
        """Return the sums over images; see `Observer.state`."""
        return (tensor for means in self._means.values() for tensor in means.state())

    def compute(self, tap: str) -> Float[Tensor, "filter"]:
        """Return the means."""
        return self._means[tap].compute()[0]


class ActivationStd:
    """Standard deviation of a filter's activation over all positions of all images.

    Polyak and Wolf, IEEE Access 2015, prune by variance; this is the biased estimate.
    """

    needs: frozenset[Need] = frozenset({"maps"})

    def __init__(self) -> None:
        self._means: dict[str, _ImageMeans] = {}

    def reset(self, taps: Mapping[str, Kernels]) -> None:
        """Start anew; see `Observer.reset`."""
        self._means = {tap: _ImageMeans(3, kernels) for tap, kernels in taps.items()}

    def update(self, features: FeatureBatch) -> None:
        """Add each image's mean, its square, and the variance within the image."""
        maps = features.maps.float()
        rounded = maps.mean(dim=(2, 3), keepdim=True)
        # Around the rounded mean nothing cancels; `torch.var_mean` is several times as slow here.
        deviation = maps - rounded
        shift = deviation.mean(dim=(2, 3)).double()  # [image, filter]
        variance = deviation.square_().mean(dim=(2, 3)).double() - shift.square()
        mean = rounded[:, :, 0, 0].double() + shift
        self._means[features.tap].update(mean, mean.square(), variance.clamp_min(0))

    def state(self) -> Iterable[Tensor]:
        """Return the sums over images; see `Observer.state`."""
        return (tensor for means in self._means.values() for tensor in means.state())

    def compute(self, tap: str) -> Float[Tensor, "filter"]:
        """Return the standard deviations."""
        mean, square, within = self._means[tap].compute().unbind()
        return (within + (square - mean.square()).clamp_min(0)).sqrt()


class _ImageMeans:
    """Means over images of one or more values for each filter."""

    def __init__(self, values: int, kernels: Kernels) -> None:
        self._images = torch.zeros((), dtype=torch.int64)
        self._total = ExactSum((values, kernels.filters), kernels.device)

    def update(self, *values: Float[Tensor, "image filter"]) -> None:
        """Add a batch."""
        self._images += len(values[0])
        self._total.update(torch.stack([value.double() for value in values], 1))

    def state(self) -> Iterable[Tensor]:
        """Return the sums."""
        return (self._images, self._total.limbs)

    def compute(self) -> Float[Tensor, "value filter"]:
        """Return the means, in float64."""
        return self._total.compute().div(int(self._images))


class Apoz:
    """Fraction of positions where a filter is above zero: 1 - the average percentage of zeros.

    Hu et al., Network Trimming, 2016, eq. 1. Without a rectifier, values that aren't positive count
    as zero.
    """

    needs: frozenset[Need] = frozenset({"maps"})

    def __init__(self) -> None:
        self._counts: dict[str, Tensor] = {}
        """`[2, filter]` by tap: positive positions, and all of them."""

    def reset(self, taps: Mapping[str, Kernels]) -> None:
        """Start anew; see `Observer.reset`."""
        self._counts = {
            tap: torch.zeros(2, kernels.filters, dtype=torch.int64, device=kernels.device)
            for tap, kernels in taps.items()
        }

    def update(self, features: FeatureBatch) -> None:
        """Count a batch's positions."""
        maps = features.maps
        # Floats are summed several times as fast as booleans, and exactly up to 2^24 positions.
        is_positive = torch.gt(maps, 0, out=torch.empty_like(maps, dtype=torch.float32))
        positive = is_positive.sum(dim=(2, 3))  # [image, filter]
        self._counts[features.tap][0] += positive.long().sum(0)
        self._counts[features.tap][1] += len(positive) * maps.shape[2:].numel()

    def state(self) -> Iterable[Tensor]:
        """Return the sums over images; see `Observer.state`."""
        return self._counts.values()

    def compute(self, tap: str) -> Float[Tensor, "filter"]:
        """Return the fractions."""
        positive, count = self._counts[tap].cpu().double().unbind()
        return positive / count


class ActivationEntropy:
    """Entropy over images of a filter's pooled activation (Luo and Wu, arXiv:1706.05791, 2017).

    The paper bins between the smallest and the largest value that occur; here bins are fixed before
    the pass, so that counts add up. They lie around the filter's mean, even near it and ever wider
    further off (`_bins`). So they suit filters that vary little, and filters whose values of both
    signs cancel in the mean.
    """

    needs: frozenset[Need] = frozenset({"maps", "statistics"})

    def __init__(self) -> None:
        self._counts: dict[str, Tensor] = {}

    def reset(self, taps: Mapping[str, Kernels]) -> None:
        """Start anew; see `Observer.reset`."""
        self._counts = {
            tap: torch.zeros(
                kernels.filters, 2 * _SIDE + 1, dtype=torch.int64, device=kernels.device
            )
            for tap, kernels in taps.items()
        }

    def update(self, features: FeatureBatch) -> None:
        """Count each image's pooled activation in its bin."""
        assert features.statistics is not None
        pooled = features.maps.float().mean(dim=(2, 3))  # [image, filter]
        bins = _bins(pooled, features.statistics.mean)
        counts = self._counts[features.tap]
        counts.scatter_add_(1, bins.T.contiguous(), torch.ones_like(bins.T.contiguous()))

    def state(self) -> Iterable[Tensor]:
        """Return the sums over images; see `Observer.state`."""
        return self._counts.values()

    def compute(self, tap: str) -> Float[Tensor, "filter"]:
        """Return the entropies, in nats."""
        counts = self._counts[tap].cpu().double()
        entropy: Tensor = torch.special.entr(counts / counts.sum(1, keepdim=True)).sum(1)
        return entropy


_SIDE = BINS_PER_DOUBLING * DOUBLINGS


def _bins(
    pooled: Float[Tensor, "image filter"], mean: Float[Tensor, "filter"]
) -> Int[Tensor, "image filter"]:
    """Return the bin of each value; the middle bin holds what is within about 1 % of the mean.

    With d the distance from the mean m, bins are steps of log2(1 + 8 |d| / |m|) on either side.
    """
    distance = (pooled - mean).double()
    unit = mean.double().abs().clamp_min(torch.finfo(torch.float32).tiny) / 8
    steps = (BINS_PER_DOUBLING * torch.log2(1 + distance.abs() / unit)).round().clamp(max=_SIDE)
    return (distance.sign() * steps).long() + _SIDE


class MapRank:
    """Mean rank of a filter's feature map as a matrix (HRank, Lin et al., CVPR 2020)."""

    needs: frozenset[Need] = frozenset({"maps"})

    def __init__(self) -> None:
        self._ranks: dict[str, Tensor] = {}

    def reset(self, taps: Mapping[str, Kernels]) -> None:
        """Start anew; see `Observer.reset`."""
        self._ranks = {
            tap: torch.zeros(kernels.filters, dtype=torch.int64, device=kernels.device)
            for tap, kernels in taps.items()
        }

    def update(self, features: FeatureBatch) -> None:
        """Add the ranks in the first `RANK_IMAGES` images of the calibration set."""
        for image in (features.indices < RANK_IMAGES).nonzero()[:, 0].tolist():
            maps = features.maps[image].float()
            if not bool(maps.isfinite().all()):
                raise DataError(
                    f"a feature map of {features.tap!r} holds values that are not finite"
                )
            self._ranks[features.tap] += torch.linalg.matrix_rank(maps)

    def state(self) -> Iterable[Tensor]:
        """Return the sums over images; see `Observer.state`."""
        return self._ranks.values()

    def compute(self, tap: str) -> Float[Tensor, "filter"]:
        """Return the summed ranks."""
        return self._ranks[tap].cpu().double()
