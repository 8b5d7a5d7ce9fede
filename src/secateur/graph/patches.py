"""What a kernel meets at chosen positions, without the patches of all the others."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.fx.node import Node

from secateur.graph.network_graph import operation_name

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
"""Operations with patches to take."""


@dataclass(frozen=True)
class Window:
    """How a kernel moves over its input, along one to three dimensions."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...] = (1, 1)
    dilation: tuple[int, ...] = (1, 1)
    border: tuple[int, ...] = (0, 0, 0, 0)
    """Zeros before and behind, of the last dimension first: left, right, above, below."""

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return math.prod(self.kernel)

    def positions(self, *sizes: int) -> tuple[int, ...]:
        """Rows and columns of what comes out, or what there is of dimensions."""
        borders = [sum(self.border[i : i + 2]) for i in range(len(self.border) - 2, -1, -2)]
        return tuple(
            (size + border - dilation * (kernel - 1) - 1) // stride + 1
            for size, border, kernel, stride, dilation in zip(
                sizes, borders, self.kernel, self.stride, self.dilation, strict=True
            )
        )

    def patches(
        self,
        inputs: Float[Tensor, "image channel *size"],
        positions: Int[Tensor, "image position"],
    ) -> Float[Tensor, "image position value"]:
        """What the kernel meets at output positions, numbered row by row.

        Of one position values are in the order of `in_patch_order`.
        """
        device = inputs.device
        coordinates = torch.unravel_index(
            positions.to(device), torch.Size(self.positions(*inputs.shape[2:]))
        )
        padded = F.pad(inputs, self.border) if any(self.border) else inputs
        padded = padded.movedim(1, -1)  # [image, row, column, channel]
        places = torch.arange(len(inputs), device=device)[:, None, None]  # [image, position, tap]
        for size, coordinate, kernel, stride, dilation in zip(
            padded.shape[1:-1], coordinates, self.kernel, self.stride, self.dilation, strict=True
        ):
            steps = dilation * torch.arange(kernel, device=device)
            along = coordinate[..., None, None] * stride + steps
            places = (places[..., None] * size + along).flatten(2)
        taken = padded.flatten(0, -2).index_select(0, places.flatten())
        return taken.reshape(*positions.shape, -1)


@dataclass(frozen=True, eq=False)
class PositionSampling:
    """Which positions of a map to look at in each image, evenly apart.

    They depend on the image's number and on `start` alone. From image to image they move on by the
    golden section, so that over the images all are met equally often.
    """

    numbers: Int[Tensor, "image"]
    most: int
    """Positions an image at most."""
    start: float
    """From 0 to 1."""

    def over(self, total: int) -> Int[Tensor, "image position"]:
        """Positions in maps of so many."""
        count = min(self.most, total)
        step = -(-total // count)
        while math.gcd(step, total) > 1:
            step += 1
        share = (self.numbers.double() * (math.sqrt(5) - 1) / 2 + self.start) % 1
        first = (share * total).long()
        along = torch.arange(count, device=self.numbers.device)
        return (first[:, None] + step * along) % total


def even_step(height: int, width: int, most: int) -> int:
    """Step from one position to the next, row by row, that takes at most `most` of a map.

    It has no factor in common with the width, so that every column is met.
    """
    step = -(-height * width // most)
    while math.gcd(step, width) > 1:
        step += 1
    return step


def window_of(node: Node, kernel: tuple[int, ...]) -> Window:
    """How the kernel of a convolution moves; `kernel` is its height and width."""
    assert operation_name(node) in CONVOLUTIONS
    dims = len(kernel)
    stride, padding, dilation = (
        node.args[i] if len(node.args) > i else default for i, default in ((3, 1), (4, 0), (5, 1))
    )
    steps = _each(dilation, dims)
    if padding == "same":  # an odd total puts the larger half at the end, as torch does
        missing = [d * (k - 1) for d, k in zip(steps, kernel, strict=True)]
        sides = [(total // 2, total - total // 2) for total in missing]
    else:
        sides = [(p, p) for p in _each(0 if padding == "valid" else padding, dims)]
    border = tuple(zeros for side in reversed(sides) for zeros in side)
    return Window(kernel, _each(stride, dims), steps, border)


def in_patch_order(
    kernel: Float[Tensor, "filter input *tap"], groups: int = 1
) -> Float[Tensor, "group output value"]:
    """A kernel's values by group, tap by tap, and of each tap input by input."""
    return kernel.movedim(1, -1).reshape(groups, kernel.shape[0] // groups, -1)


def from_patch_order(
    rows: Float[Tensor, "group output value"], shape: torch.Size
) -> Float[Tensor, "filter input *tap"]:
    """A kernel of a shape, from the form that `in_patch_order` gives."""
    return rows.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()


def _each(value: object, dims: int) -> tuple[int, ...]:
    """A number for each dimension, of one for all or of as many."""
    if isinstance(value, int):
        return (value,) * dims
    assert isinstance(value, list | tuple)
    numbers = tuple(value) if len(value) == dims else (value[0],) * dims
    assert all(isinstance(number, int) for number in numbers)
    return numbers
