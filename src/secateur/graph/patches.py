"""The input patches of a kernel at chosen positions, without those of all other positions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.fx.node import Node

from secateur.graph.network_graph import operation_name

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
"""Operations whose kernels read patches."""


@dataclass(frozen=True)
class Window:
    """How a kernel moves over its input, along one to three dimensions."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...] = (1, 1)
    dilation: tuple[int, ...] = (1, 1)
    border: tuple[int, ...] = (0, 0, 0, 0)
    """Zero padding before and after, the last dimension first: left, right, top, bottom."""

    @property
    def taps(self) -> int:
        """Number of positions of the kernel."""
        return math.prod(self.kernel)

    def positions(self, *sizes: int) -> tuple[int, ...]:
        """Return the output size along each dimension, for an input of these sizes."""
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
        positions: Int[Tensor, "chosen position"],
        images: Int[Tensor, "chosen"],
    ) -> Float[Tensor, "chosen position value"]:
        """Return the kernel's inputs at output positions of some `images`.

        Positions are numbered row by row. The values of one are in the order of `in_patch_order`.
        """
        device, sizes = inputs.device, inputs.shape[2:]
        coordinates = torch.unravel_index(positions.to(device), torch.Size(self.positions(*sizes)))
        place = images.to(device)[:, None, None]  # [chosen, position, tap]
        is_inside = torch.ones_like(place, dtype=torch.bool)
        before = self.border[-2::-2]  # of the first dimension, then of the next
        for size, coordinate, kernel, stride, dilation, border in zip(
            sizes, coordinates, self.kernel, self.stride, self.dilation, before, strict=True
        ):
            steps = dilation * torch.arange(kernel, device=device) - border
            along = coordinate[..., None, None] * stride + steps
            place = (place[..., None] * size + along.clamp(0, size - 1)).flatten(2)
            is_inside = (is_inside[..., None] & (along >= 0) & (along < size)).flatten(2)
        values = inputs.movedim(1, -1).flatten(0, -2).index_select(0, place.flatten())
        if any(self.border):
            values.masked_fill_(~is_inside.flatten()[:, None], 0)
        return values.reshape(*positions.shape, -1)


@dataclass(frozen=True, eq=False)
class PositionSampling:
    """Chooses evenly spaced positions of a feature map for each image.

    They depend only on the image's number and on `start`. From image to image they shift by the
    golden ratio, so that over many images every position is chosen equally often.
    """

    numbers: Int[Tensor, "image"]
    most: int
    """Maximum number of positions per image."""
    start: float
    """Offset of the first position, from 0 to 1."""
    chosen: Int[Tensor, "image position"] | None = None
    """Positions to use in place of evenly spaced ones."""

    def over(self, total: int) -> Int[Tensor, "image position"]:
        """Return the positions to use in feature maps with `total` positions."""
        if self.chosen is not None:
            return self.chosen
        count = min(self.most, total)
        step = -(-total // count)
        while math.gcd(step, total) > 1:
            step += 1
        first = (first_places(self.numbers, self.start) * total).long()
        along = torch.arange(count, device=self.numbers.device)
        return (first[:, None] + step * along) % total


def first_places(numbers: Int[Tensor, "image"], start: float = 0.0) -> Float[Tensor, "image"]:
    """Return where each image begins, from 0 to 1, in steps of the golden ratio."""
    return (numbers.double() * (math.sqrt(5) - 1) / 2 + start) % 1


def even_step(height: int, width: int, most: int) -> int:
    """Return the step between positions, row by row, that uses at most `most` of a feature map.

    It has no factor in common with the width, so that every column is used.
    """
    step = -(-height * width // most)
    while math.gcd(step, width) > 1:
        step += 1
    return step


def window_of(node: Node, kernel: tuple[int, ...]) -> Window:
    """Return the window of a convolution; `kernel` is its height and width."""
    assert operation_name(node) in CONVOLUTIONS
    dims = len(kernel)
    stride, padding, dilation = (
        node.args[i] if len(node.args) > i else default for i, default in ((3, 1), (4, 0), (5, 1))
    )
    steps = _per_dimension(dilation, dims)
    if padding == "same":  # the larger half of an odd total goes to the end, as in torch
        missing = [d * (k - 1) for d, k in zip(steps, kernel, strict=True)]
        sides = [(total // 2, total - total // 2) for total in missing]
    else:
        sides = [(p, p) for p in _per_dimension(0 if padding == "valid" else padding, dims)]
    border = tuple(zeros for side in reversed(sides) for zeros in side)
    return Window(kernel, _per_dimension(stride, dims), steps, border)


def _per_dimension(value: object, dims: int) -> tuple[int, ...]:
    """Return a number per dimension, from one number for all of them or one for each."""
    if isinstance(value, int):
        return (value,) * dims
    assert isinstance(value, list | tuple)
    numbers = tuple(value) if len(value) == dims else (value[0],) * dims
    assert all(isinstance(number, int) for number in numbers)
    return numbers
