"""Criteria that need no images: random, and functions of the weights."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.graph.taps import Kernels
from secateur.runtime.errors import UsageError
from secateur.scoring.channel_means import mean_by_channel
from secateur.scoring.criteria import FeatureBatch, Need

OfRows = Callable[[Float[Tensor, "row value"]], Float[Tensor, "row"]]


class _WithoutImages:
    """The observer's part of a criterion that needs no images: it keeps the kernels."""

    needs: frozenset[Need] = frozenset()

    def __init__(self) -> None:
        self._kernels: Mapping[str, Kernels] = {}

    def reset(self, taps: Mapping[str, Kernels]) -> None:
        """Start anew; see `Observer.reset`."""
        self._kernels = taps

    def update(self, features: FeatureBatch) -> None:
        """Do nothing; it is never called."""

    def state(self) -> Iterable[Tensor]:
        """Return no tensors: there is nothing to add up."""
        return ()


class Random(_WithoutImages):
    """A random order, the same for the same seed and group."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed

    def compute(self, tap: str) -> Float[Tensor, "filter"]:
        """Return uniform random numbers."""
        generator = torch.Generator().manual_seed(self._seed + zlib.crc32(tap.encode()))
        filters = self._kernels[tap].filters
        return torch.rand(filters, generator=generator, dtype=torch.float64)


class KernelFunction(_WithoutImages):
    """A function of each kernel that produces a channel, averaged over those kernels."""

    def __init__(self, function: OfRows) -> None:
        super().__init__()
        self._function = function

    def compute(self, tap: str) -> Float[Tensor, "filter"]:
        """Return the function's means."""
        return mean_over_producers(self._function, tap, self._kernels[tap])


def checked(function: Callable[[Tensor], Any], name: str) -> OfRows:
    """Return a function of the user's that raises `UsageError` if it returns no score a kernel."""

    def scores_of(kernels: Float[Tensor, "row value"]) -> Float[Tensor, "row"]:
        what = f"the criterion {name} gets kernels {list(kernels.shape)}, one row a filter, and"
        try:
            scores = torch.as_tensor(function(kernels.detach()), dtype=torch.float64)
        except Exception as error:  # the function is the user's: it may raise anything
            words = " ".join(str(error).split())
            raise UsageError(f"{what} fails: {type(error).__name__}: {words}") from error
        if scores.shape != kernels.shape[:1]:
            raise UsageError(
                f"{what} must return {len(kernels)} scores, as kernels.abs().sum(1) does; it "
                f"returned {list(scores.shape)}"
            )
        return scores

    return scores_of


def mean_over_producers(function: OfRows, tap: str, kernels: Kernels) -> Float[Tensor, "filter"]:
    """Return the mean of a function over the kernels that produce each filter's channel.

    Raises `UsageError` if a filter has none.
    """
    rows = [
        (channels, function(kernel.cpu().double().flatten(1)))
        for kernel, channels in kernels.incoming
    ]
    return _by_filter(tap, kernels, rows, "kernel that produces")


class NormScale(_WithoutImages):
    """Size of the scale that batch norm gives the filter (Liu et al., ICCV 2017, section 3).

    The paper first trains with an L1 penalty on the scales; here they are used as they are.
    """

    def compute(self, tap: str) -> Float[Tensor, "filter"]:
        """Return the mean size over the batch norms; raises `UsageError` if there is none."""
        kernels = self._kernels[tap]
        rows = [(channels, scale.cpu().double().abs()) for scale, channels in kernels.norm_scales]
        return _by_filter(tap, kernels, rows, "batch norm whose scale could rank")


def _by_filter(
    tap: str,
    kernels: Kernels,
    rows: list[tuple[Int[Tensor, "_"], Float[Tensor, "_"]]],
    missing: str,
) -> Float[Tensor, "filter"]:
    """Return the mean value of each filter's channel; raises `UsageError` if it has none."""
    indices = (kernels.channel, *(channels for channels, _ in rows))
    means, count = mean_by_channel(rows, 1 + max(int(index.max()) for index in indices))
    without = int((count[kernels.channel] == 0).sum())
    if without:
        raise UsageError(f"{tap!r} has no {missing} {without} of its {kernels.filters} filters")
    return means[kernels.channel]


def l1(kernels: Float[Tensor, "row value"]) -> Float[Tensor, "row"]:
    """Return the sum of absolute weights (Li et al., ICLR 2017, section 3.1)."""
    return kernels.abs().sum(1)


def l2(kernels: Float[Tensor, "row value"]) -> Float[Tensor, "row"]:
    """Return the Euclidean norm, the common variant of `l1` (He et al., SFP, IJCAI 2018, eq. 2)."""
    return kernels.square().sum(1).sqrt()


def distance_to_others(kernels: Float[Tensor, "row value"]) -> Float[Tensor, "row"]:
    """Return the sum of the Euclidean distances to the layer's other kernels.

    Small near their geometric median (FPGM, He et al., CVPR 2019, eqs. 5 and 6).
    """
    distances: Tensor = torch.cdist(kernels, kernels)
    # cdist uses matrix products, ten times as fast, which leave a rounding error on the diagonal.
    return distances.fill_diagonal_(0.0).sum(1)
