"""Preprocessing: the sizes and the values of images that a network takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.config import Resizing

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """How images are prepared for a network: sizes in pixels, mean and deviation of x / 255."""

    image_size: int
    resize: int
    """The shorter side before the centre crop to `image_size`."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: Resizing = "bilinear"

    def normalise(self, images: Tensor) -> Tensor:
        """Return uint8 images `[image, rgb, height, width]` as normalised float32.

        Floats count as normalised already and are returned unchanged.
        """
        if images.is_floating_point():
            return images
        mean = torch.tensor(self.mean, device=images.device).reshape(3, 1, 1)
        std = torch.tensor(self.std, device=images.device).reshape(3, 1, 1)
        return (images.float() / 255 - mean) / std
