"""What a kernel meets at chosen positions, without the patches of all the others."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.fx.node import Node

from secateur.graph import operation_name


@dataclass(frozen=True)
class Window:
    """How a kernel moves over its input."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    border: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Zeros to the left, to the right, above and below."""

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return self.kernel[0] * self.kernel[1]

    def positions(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of what comes out."""
        left, right, above, below = self.border
        sizes = (height + above + below, width + left + right)
        rows, columns = (
            (size - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, dilation in zip(
                sizes, self.kernel, self.stride, self.dilation, strict=True
            )
        )
        return rows, columns

    def take(
        self,
        inputs: Float[Tensor, "image channel h w"],
        positions: Int[Tensor, "image position"],
    ) -> Float[Tensor, "image position value"]:
        """What the kernel meets at output positions, numbered row by row.

        Of one position values are in the order of `in_patch_order`.
        """
        _, width = self.positions(inputs.shape[2], inputs.shape[3])
        padded = F.pad(inputs, self.border) if any(self.border) else inputs
        padded = padded.movedim(1, -1)  # [image, row, column, channel]
        row = positions // width * self.stride[0]
        column = positions % width * self.stride[1]
        rows = row[..., None, None] + self.dilation[0] * torch.arange(self.kernel[0])[:, None]
        columns = column[..., None, None] + self.dilation[1] * torch.arange(self.kernel[1])
        image = torch.arange(len(inputs))[:, None, None, None]
        places = (image * padded.shape[1] + rows) * padded.shape[2] + columns
        taken = padded.flatten(0, 2).index_select(0, places.flatten())
        return taken.reshape(*positions.shape, -1)


def even_step(height: int, width: int, most: int) -> int:
    """Step from one position to the next, row by row, that takes at most `most` of a map.

    It has no factor in common with the width, so that every column is met.
    """
    step = -(-height * width // most)
    while math.gcd(step, width) > 1:
        step += 1
    return step


def window_of(node: Node, kernel: tuple[int, ...]) -> Window:
    """How the kernel of a two-dimensional convolution moves; `kernel` is its height and width."""
    assert operation_name(node) == "conv2d"
    stride, padding, dilation = (
        node.args[i] if len(node.args) > i else default for i, default in ((3, 1), (4, 0), (5, 1))
    )
    steps = _pair(dilation)
    if padding == "same":  # an odd total puts the larger half at the end, as torch does
        missing = [d * (k - 1) for d, k in zip(steps, kernel, strict=True)]
        top, left = (m // 2 for m in missing)
        border = (left, missing[1] - left, top, missing[0] - top)
    else:
        above, left = _pair(0 if padding == "valid" else padding)
        border = (left, left, above, above)
    return Window((kernel[0], kernel[1]), _pair(stride), steps, border)


def in_patch_order(kernel: Float[Tensor, "output input ..."]) -> Float[Tensor, "output value"]:
    """A kernel's values tap by tap, and of each tap input by input."""
    return kernel.movedim(1, -1).flatten(1)


def from_patch_order(
    rows: Float[Tensor, "output value"], shape: torch.Size
) -> Float[Tensor, "output input ..."]:
    """A kernel of a shape, from the form that `in_patch_order` gives."""
    return rows.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()


def _pair(value: object) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    assert isinstance(value, list | tuple)
    first, second = value if len(value) == 2 else (value[0], value[0])
    assert isinstance(first, int)
    assert isinstance(second, int)
    return first, second
