"""How images are brought to the values and the size that a network takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.config import Resizing

IMAGENET_MEAN = (0.485, 0.456, 0.406)


IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """How images are brought to a network: sizes in pixels, mean and deviation of x / 255."""

    image_size: int
    resize: int
    """The shorter side before the centre crop to `image_size`."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: Resizing = "bilinear"

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 `[image, rgb, height, width]` as float32, with zero mean and unit deviation.

        Floats are taken to be normalised, and come back as they are.
        """
        if images.is_floating_point():
            return images
        mean = torch.tensor(self.mean, device=images.device).reshape(3, 1, 1)
        std = torch.tensor(self.std, device=images.device).reshape(3, 1, 1)
        return (images.float() / 255 - mean) / std
