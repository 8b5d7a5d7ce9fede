"""Second moments of a layer's filters over sampled positions."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.patches import even_step

POSITIONS = 64
"""Positions that are taken from each map, evenly spaced."""


class SecondMoments:
    """Sums of products of the filters of one part, at the same position.

    Sums are in float64; merged in another order they agree to within its rounding.
    """

    def __init__(self, filters: int) -> None:
        self._count = torch.zeros((), dtype=torch.float64)
        self._products = torch.zeros(filters, filters, dtype=torch.float64)

    def add(self, maps: Float[Tensor, "image filter h w"]) -> None:
        """Takes in the feature maps of a batch."""
        values = maps.flatten(2)
        step = even_step(maps.shape[2], maps.shape[3], POSITIONS)
        rows = values[:, :, ::step].movedim(1, -1).flatten(0, 1).double()  # [position, filter]
        self._count += len(rows)
        self._products += rows.T @ rows

    def tallies(self) -> Iterable[Tensor]:
        """See `Observer.tallies`."""
        return (self._count, self._products)

    @property
    def raw(self) -> Float[Tensor, "filter filter"]:
        """Mean products."""
        return self._products / self._count
