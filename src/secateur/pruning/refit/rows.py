"""Rows of channels: pick positions from feature maps, and split channels by group."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor


def at_positions(
    maps: Float[Tensor, "image channel position"], positions: Int[Tensor, "image chosen"]
) -> Float[Tensor, "image chosen channel"]:
    """Return maps at some positions of each image."""
    index = positions.to(maps.device)[:, None].expand(-1, maps.shape[1], -1)
    return maps.gather(2, index).movedim(1, -1)


def by_group(
    rows: Float[Tensor, "image position channel"], groups: int
) -> Float[Tensor, "group row value"]:
    """Return rows of channels by group; the channels of a group are consecutive."""
    return rows.reshape(-1, groups, rows.shape[-1] // groups).movedim(1, 0)
