"""Rows of channels: pick positions from feature maps, and split channels by group."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def at_positions(
    maps: Float[Tensor, "image channel position"], positions: Int[Tensor, "image chosen"]
) -> Float[Tensor, "image chosen channel"]:
    """Return maps at some positions of each image."""
    index = positions.to(maps.device)[:, None].expand(-1, maps.shape[1], -1)
    return maps.gather(2, index).movedim(1, -1)


def row_numbers(images: Int[Tensor, "image"], rows_per_image: int) -> Int[Tensor, "row"]:
    """Return the numbers of images' rows: several frames of a film."""
    return (images[:, None] * rows_per_image + torch.arange(rows_per_image)).flatten()


def by_group(
    rows: Float[Tensor, "image position channel"], groups: int
) -> Float[Tensor, "group row value"]:
    """Return rows of channels by group; the channels of a group are consecutive."""
    return rows.reshape(-1, groups, rows.shape[-1] // groups).movedim(1, 0)


def in_patch_order(
    kernel: Float[Tensor, "filter input *tap"], groups: int = 1
) -> Float[Tensor, "group output value"]:
    """Return a kernel's values by group: all inputs of one kernel position, then of the next."""
    return kernel.movedim(1, -1).reshape(groups, kernel.shape[0] // groups, -1)


def from_patch_order(
    rows: Float[Tensor, "group output value"], shape: torch.Size
) -> Float[Tensor, "filter input *tap"]:
    """Return the kernel of a given shape from its `in_patch_order` form."""
    return rows.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()
