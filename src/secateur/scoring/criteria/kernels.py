"""Criteria that need no images: chance, and the kernels themselves."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.errors import UsageError
from secateur.scoring.criteria import FeatureBatch, Kernels, Need

OfRows = Callable[[Float[Tensor, "row value"]], Float[Tensor, "row"]]


class _WithoutImages:
    """What criteria without images have in common: they keep the kernels alone."""

    needs: frozenset[Need] = frozenset()

    def __init__(self) -> None:
        self._parts: Mapping[str, Kernels] = {}

    def reset(self, parts: Mapping[str, Kernels]) -> None:
        """Takes the kernels down."""
        self._parts = parts

    def update(self, sight: FeatureBatch) -> None:
        """Not called."""

    def state(self) -> Iterable[Tensor]:
        """There are none."""
        return ()


class Random(_WithoutImages):
    """A random order, the same for the same seed and group."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed

    def compute(self, part: str) -> Float[Tensor, "filter"]:
        """Uniform random numbers."""
        generator = torch.Generator().manual_seed(self._seed + zlib.crc32(part.encode()))
        filters = self._parts[part].filters
        return torch.rand(filters, generator=generator, dtype=torch.float64)


class KernelFunction(_WithoutImages):
    """A function of each kernel that writes a channel, averaged over the kernels that do."""

    def __init__(self, function: OfRows) -> None:
        super().__init__()
        self._function = function

    def compute(self, part: str) -> Float[Tensor, "filter"]:
        """The function's means."""
        return mean_over_producers(self._function, part, self._parts[part])


def mean_over_producers(function: OfRows, tap: str, kernels: Kernels) -> Float[Tensor, "filter"]:
    """The mean of a function over the kernels that write each filter's channel.

    Raises `UsageError` where there is none.
    """
    rows = [(function(kernel.double().flatten(1).cpu()), rows) for kernel, rows in kernels.incoming]
    return _by_filter(tap, kernels, rows, "kernel that writes")


class NormScale(_WithoutImages):
    """Size of the scale that batch norm gives the filter (Liu et al., ICCV 2017, section 3).

    The paper trains with an L1 penalty on the scales first; here they are taken as they are.
    """

    def compute(self, part: str) -> Float[Tensor, "filter"]:
        """The sizes, averaged over the norms on the way; raises `UsageError` where there is
        none."""
        kernels = self._parts[part]
        rows = [(scale.double().abs().cpu(), rows) for scale, rows in kernels.norm_scales]
        return _by_filter(part, kernels, rows, "batch norm whose scale could rank")


def _by_filter(
    part: str,
    kernels: Kernels,
    found: list[tuple[Float[Tensor, "row"], Int[Tensor, "row"]]],
    missing: str,
) -> Float[Tensor, "filter"]:
    """The mean of the values of each filter's channel; raises `UsageError` where it has none."""
    channels = 1 + max(int(rows.max()) for rows in (kernels.channel, *(rows for _, rows in found)))
    total, count = torch.zeros(2, channels, dtype=torch.float64).unbind()
    for values, rows in found:
        total.index_add_(0, rows, values)
        count.index_add_(0, rows, torch.ones_like(values))
    without = int((count[kernels.channel] == 0).sum())
    if without:
        raise UsageError(f"{part!r} has no {missing} {without} of its {kernels.filters} filters")
    return (total / count)[kernels.channel]


def l1(kernels: Float[Tensor, "row value"]) -> Float[Tensor, "row"]:
    """Sum of absolute weights (Li et al., ICLR 2017, section 3.1)."""
    return kernels.abs().sum(1)


def l2(kernels: Float[Tensor, "row value"]) -> Float[Tensor, "row"]:
    """Euclidean norm, the common variant of `l1` (He et al., SFP, IJCAI 2018, eq. 2)."""
    return kernels.square().sum(1).sqrt()


def distance_to_others(kernels: Float[Tensor, "row value"]) -> Float[Tensor, "row"]:
    """Sum of the Euclidean distances to the layer's other kernels.

    Small near their geometric median (FPGM, He et al., CVPR 2019, eqs. 5 and 6).
    """
    distances: Tensor = torch.cdist(kernels, kernels)
    # By matrix products, ten times as fast: what rounding leaves between a kernel and itself goes.
    return distances.fill_diagonal_(0.0).sum(1)
