"""Preprocessing: the sizes and the values of images that a network takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from torch import Tensor

from secateur.config import Resizing

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LUMA = (19595, 38470, 7471)
"""Weights of red, green and blue in grey, in 1 / 65,536."""


@dataclass(frozen=True)
class Preprocessing:
    """How images are prepared for a network: sizes in pixels, mean and deviation of x / 255."""

    image_size: int
    resize: int
    """The shorter side before the centre crop to `image_size`."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Of the three colours, or of grey."""
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: Resizing = "bilinear"
    keeps_exact: bool = False
    """Whether images of `image_size` × `image_size` are read as they are stored."""

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
        return (images.float() / 255 - mean) / std


def to_grey(
    images: UInt8[Tensor, "image rgb height width"],
) -> UInt8[Tensor, "image 1 height width"]:
    """Return the luma of colours (ITU-R BT.601), as Pillow rounds it; grey stays as it is."""
    weights = torch.tensor(LUMA, dtype=torch.int32, device=images.device).reshape(3, 1, 1)
    return (((images.int() * weights).sum(1, keepdim=True) + 2**15) >> 16).to(torch.uint8)
