"""Preprocessing: the sizes and the values of images that a network takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from secateur.config import ChannelOrder, Fit, PadPlace, Resizing

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LUMA = (19595, 38470, 7471)
"""Weights of red, green and blue in grey, in 1 / 65,536."""


@dataclass(frozen=True)
class Geometry:
    """Where a stored image lies in a network's input: column `x` at `x * scale_x + offset_x`.

    Coordinates are in pixels from the upper left corner, so that pixel 0 reaches from 0 to 1.
    """

    scale_x: float = 1.0
    scale_y: float = 1.0
    offset_x: float = 0.0
    offset_y: float = 0.0

    def to_input(self, points: Float[Tensor, "*shape 2"]) -> Float[Tensor, "*shape 2"]:
        """Return where points (x, y) of the stored image are in the input."""
        return points * self._scale(points) + self._offset(points)

    def to_stored(self, points: Float[Tensor, "*shape 2"]) -> Float[Tensor, "*shape 2"]:
        """Return where points (x, y) of the input are in the stored image."""
        return (points - self._offset(points)) / self._scale(points)

    def then(self, other: Geometry) -> Geometry:
        """Return where an image lies in `other`'s input if this input is what `other` stores."""
        return Geometry(
            self.scale_x * other.scale_x,
            self.scale_y * other.scale_y,
            self.offset_x * other.scale_x + other.offset_x,
            self.offset_y * other.scale_y + other.offset_y,
        )

    def _scale(self, points: Tensor) -> Tensor:
        return points.new_tensor((self.scale_x, self.scale_y))

    def _offset(self, points: Tensor) -> Tensor:
        return points.new_tensor((self.offset_x, self.offset_y))


@dataclass(frozen=True)
class Preprocessing:
    """How images are prepared for a network: sizes in pixels, mean and deviation of x / 255."""

    image_size: int | tuple[int, int]
    """Side of a square input, or height and width."""
    resize: int
    """With `fit = "crop"`: the shorter side before the centre crop to a square input. A resized
    image covers another input, larger by `resize / min(image_size)`, in the same way."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Of red, green and blue, in whichever order the network takes them, or of grey."""
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: Resizing = "bilinear"
    keeps_exact: bool = False
    """Whether images of `image_size` are read as they are stored."""
    fit: Fit = "crop"
    pad_value: int = 114
    """Value from 0 to 255 of the pixels around a letterboxed image."""
    pad_at: PadPlace = "centre"
    channel_order: ChannelOrder = "rgb"
    value_range: int = 1
    """What normalised values are multiplied by: 1, or 255 for networks that take pixels' values."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the input."""
        side = self.image_size
        return (side, side) if isinstance(side, int) else side

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return len(self.mean), *self.size

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width to which a stored image is resized before crop or padding."""
        rows, columns = self.size
        if self.fit == "stretch" or (self.keeps_exact and (height, width) == self.size):
            return self.size
        if self.fit == "letterbox":
            # Networks that are padded at the right and bottom round down (torchvision's, YOLOX).
            whole = math.floor if self.pad_at == "top-left" else round
            scale = min(rows / height, columns / width)
            return max(1, whole(height * scale)), max(1, whole(width * scale))
        least = min(rows, columns)
        rows, columns = (round(side * self.resize / least) for side in (rows, columns))
        if height * columns >= width * rows:
            return columns * height // width, columns
        return rows, rows * width // height

    def geometry(self, height: int, width: int) -> Geometry:
        """Return where a stored image of this height and width lies in the input."""
        (rows, columns), (inner_rows, inner_columns) = self.size, self.resized(height, width)
        is_top_left = self.fit == "letterbox" and self.pad_at == "top-left"
        left, top = (
            0 if is_top_left else _centre(outer, inner)
            for outer, inner in ((columns, inner_columns), (rows, inner_rows))
        )
        return Geometry(inner_columns / width, inner_rows / height, left, top)

    def normalise(self, images: Tensor) -> Tensor:
        """Return uint8 images `[image, rgb, height, width]` as normalised float32.

        They become grey, `[image, 1, height, width]`, if there is one mean. Floats count as
        normalised already and are returned unchanged.
        """
        if images.is_floating_point():
            return images
        if len(self.mean) == 1:
            images = to_grey(images)
        mean = torch.tensor(self.mean, device=images.device).reshape(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).reshape(-1, 1, 1)
        if self.value_range == 1:
            values = (images.float() / 255 - mean) / std
        else:
            values = (images.float() - 255 * mean) * (self.value_range / 255) / std
        return values.flip(1) if self.channel_order == "bgr" else values

    def colours(self, images: Float[Tensor, "image channel *position"]) -> Tensor:
        """Return the values from 0 to 1, in the order red, green and blue, of normalised images."""
        mean = torch.tensor(self.mean, device=images.device).reshape(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).reshape(-1, 1, 1)
        if self.channel_order == "bgr":
            images = images.flip(1)
        if self.value_range != 1:
            images = images / self.value_range
        return images * std + mean


def _centre(outer: int, inner: int) -> int:
    """Return the place of the middle of an axis, rounded as torchvision's centre crop does."""
    return (outer - inner) // 2 if inner < outer else -round((inner - outer) / 2)


def to_grey(
    images: UInt8[Tensor, "image rgb height width"],
) -> UInt8[Tensor, "image 1 height width"]:
    """Return the luma of colours (ITU-R BT.601), as Pillow rounds it; grey stays as it is."""
    weights = torch.tensor(LUMA, dtype=torch.int32, device=images.device).reshape(3, 1, 1)
    return (((images.int() * weights).sum(1, keepdim=True) + 2**15) >> 16).to(torch.uint8)
