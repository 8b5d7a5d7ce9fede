"""What is usual for each filter: its mean and its top quantile, from a sample of positions.

The threshold T_c is the value that filter c exceeds at a share q of all positions of all images
(Bau et al., Network Dissection, CVPR 2017, section 2.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

MAX_VALUES_A_BATCH = 4096
"""Positions of a batch that are looked at, evenly spaced over images, rows and columns."""


@dataclass(frozen=True, eq=False)
class Usual:
    """Each filter's mean and threshold."""

    mean: Float[Tensor, "filter"]
    threshold: Float[Tensor, "filter"]


class UsualTally:
    """Gathers a sample of each filter's activations, batch by batch."""

    def __init__(self) -> None:
        self._values: list[Tensor] = []

    def add(self, maps: Float[Tensor, "image filter h w"]) -> None:
        """Takes in the feature maps of a batch."""
        values = maps.movedim(1, 0).flatten(1)  # [filter, position]
        step = -(-values.shape[1] // MAX_VALUES_A_BATCH)
        # An odd step meets every column of a map whose width is a power of two.
        step += (step > 1) and (step % 2 == 0)
        self._values.append(values[:, ::step].clone())

    def finish(self, quantile: float) -> Usual:
        """Means, and thresholds exceeded by the share `quantile` of the sampled positions.

        The threshold is an activation that occurs: the largest that at least `quantile` of the
        sample exceed or equal. A share q of n sampled positions is known to within about
        sqrt(q (1 - q) / n).
        """
        values = torch.cat(self._values, dim=1)
        count = values.shape[1]
        rank = count - max(1, round(quantile * count))  # 0 is the smallest
        threshold = values.kthvalue(rank + 1, dim=1).values
        return Usual(values.double().mean(1).float(), threshold)
