"""Mean values by channel, over the filters, kernels or norms that belong to each."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor


def mean_by_channel(
    rows: Iterable[tuple[Int[Tensor, "_"], Float[Tensor, "_"]]], channels: int
) -> tuple[Float[Tensor, "channel"], Float[Tensor, "channel"]]:
    """Return each channel's mean value in float64, NaN if it has none, and how many it has.

    `rows` holds tensors of channel indices, each with the values that belong to them.
    """
    total, count = torch.zeros(2, channels, dtype=torch.float64).unbind()
    for index, values in rows:
        total.index_add_(0, index, values.double())
        count.index_add_(0, index, torch.ones(len(index), dtype=torch.float64))
    return total / count, count
