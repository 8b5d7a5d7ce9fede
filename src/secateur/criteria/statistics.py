"""Criteria from the statistics of a filter's activations."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.criteria import Kernels, Sight


class ActivationStd:
    """Standard deviation of a filter's activation over all positions of all images.

    (Polyak and Wolf, IEEE Access 2015, prune by variance; biased estimate.)
    """

    needs_images = True
    needs_gradients = False

    def __init__(self) -> None:
        self._count: dict[str, int] = {}
        self._sum: dict[str, Tensor] = {}
        self._square_sum: dict[str, Tensor] = {}

    def observe(self, sight: Sight) -> None:
        """Adds up values and squares, around a fixed centre so that nothing cancels."""
        maps = (sight.maps - sight.usual.mean[:, None, None]).double()
        zero = torch.zeros(maps.shape[1], dtype=torch.float64)
        group = sight.group
        self._count[group] = self._count.get(group, 0) + maps.numel() // maps.shape[1]
        self._sum[group] = self._sum.get(group, zero) + maps.sum(dim=(0, 2, 3)).cpu()
        squares = maps.square().sum(dim=(0, 2, 3)).cpu()
        self._square_sum[group] = self._square_sum.get(group, zero) + squares

    def score(self, group: str, kernels: Kernels) -> Float[Tensor, "filter"]:
        """The standard deviations."""
        mean = self._sum[group] / self._count[group]
        return (self._square_sum[group] / self._count[group] - mean.square()).clamp_min(0).sqrt()
