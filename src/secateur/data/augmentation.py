"""Random changes of training images that leave an image's class as it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Num
from torch import Tensor
from torchvision.transforms import v2

from secateur.config import Crop
from secateur.data.images import Images, Indices, to_size
from secateur.data.preprocessing import Preprocessing
from secateur.runtime.seeding import seed_of

LARGEST_SHIFTED = 64
"""Side in pixels up to which images are by default shifted rather than cropped and resized."""


@dataclass(frozen=True)
class Augmentation:
    """How each image is changed; every image by its own draw."""

    crop: Crop = "random_crop"
    """`shift`: by up to an eighth of the side over a border of zeros, as He et al. (2016, section
    4.2) train on CIFAR. `resized`: a random part of the image as stored, of 8 % to 100 % of its
    area, stretched to the size, as Szegedy et al. (2015) train on ImageNet."""
    flip: bool = True
    """Whether half of the images are mirrored."""
    randaugment: bool = False
    """Whether two operations drawn from RandAugment's list (Cubuk et al., 2020) come first."""

    @property
    def is_imagewise(self) -> bool:
        """Whether images are changed one by one, before they are normalised and batched."""
        return self.crop == "random_resized_crop" or self.randaugment

    def augment(
        self, pixels: Num[Tensor, "rgb _ _"], preprocessing: Preprocessing
    ) -> Num[Tensor, "rgb height width"]:
        """What is done to a stored image one by one; draws from torch's global generator."""
        if self.crop == "random_resized_crop":
            interpolation = v2.InterpolationMode(preprocessing.interpolation)
            crop = v2.RandomResizedCrop(preprocessing.image_size, interpolation=interpolation)
            pixels = crop(pixels)
        else:
            pixels = to_size(pixels, preprocessing)
        if self.randaugment:
            pixels = v2.RandAugment()(pixels)
        return pixels

    def draw(self, count: int, side: int, generator: torch.Generator) -> ShiftsAndFlips:
        """The shifts and mirrored ones of so many images."""
        border = side // 8 if self.crop == "random_crop" else 0
        top = torch.randint(2 * border + 1, (count, 1), generator=generator)
        left = torch.randint(2 * border + 1, (count, 1), generator=generator)
        flipped = torch.rand(count, 1, generator=generator) < 0.5
        return ShiftsAndFlips(border, top, left, flipped & self.flip)


@dataclass(frozen=True, eq=False)
class ShiftsAndFlips:
    """Where each image of a batch is moved to."""

    border: int
    top: Tensor
    """First row of what stays of the image with its border, `[image, 1]`; `left` alike."""
    left: Tensor
    flipped: Tensor
    """bool `[image, 1]`."""

    def select(self, chosen: slice | Tensor) -> ShiftsAndFlips:
        """Those of some of the images."""
        return ShiftsAndFlips(
            self.border, self.top[chosen], self.left[chosen], self.flipped[chosen]
        )

    def apply(
        self, images: Float[Tensor, "image rgb height width"]
    ) -> Float[Tensor, "image rgb height width"]:
        """The moved images; what comes in from outside is zero."""
        count, channels, height, width = images.shape
        padded = torch.nn.functional.pad(images, 4 * [self.border])
        columns = self.left + torch.arange(width)  # [image, width]
        columns = torch.where(self.flipped, columns.flip(1), columns)
        rows = self.top + torch.arange(height)
        row_index = rows[:, None, :, None].expand(count, channels, height, padded.shape[-1])
        column_index = columns[:, None, None, :].expand(count, channels, height, width)
        return padded.gather(2, row_index).gather(3, column_index)


@dataclass(frozen=True, eq=False)
class AugmentedImages:
    """Images that are changed one by one as they are read, each by its number and `seeds` alone."""

    images: Images
    augmentation: Augmentation
    seeds: tuple[int, ...]

    def read(
        self, indices: Indices, preprocessing: Preprocessing
    ) -> Num[Tensor, "image rgb height width"]:
        """See `Images.read`."""
        changed = []
        with torch.random.fork_rng(devices=[]):
            originals = self.images.originals(indices)
            for index, pixels in zip(indices.tolist(), originals, strict=True):
                torch.manual_seed(seed_of(*self.seeds, index))
                changed.append(self.augmentation.augment(pixels, preprocessing))
        return torch.stack(changed)
