"""Random changes of training images that keep an image's class: crops, flips, RandAugment."""

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
"""Side in pixels up to which the default is `random_crop`, not `random_resized_crop`."""


@dataclass(frozen=True)
class Augmentation:
    """How images are changed, each by its own random draw."""

    crop: Crop = "random_crop"
    """`random_crop`: shift by up to an eighth of the side over a border of zeros, as He et al.
    (2016, section 4.2) train on CIFAR. `random_resized_crop`: a random part of the stored image, of
    8 % to 100 % of its area, resized to the input's size, as Szegedy et al. (2015) train on
    ImageNet."""
    flip: bool = True
    """Whether half of the images are mirrored."""
    randaugment: bool = False
    """Whether two random operations of RandAugment (Cubuk et al., 2020) come first."""

    @property
    def is_imagewise(self) -> bool:
        """Whether images are changed one by one, before they are normalised and batched."""
        return self.crop == "random_resized_crop" or self.randaugment

    def augment(
        self, pixels: Num[Tensor, "rgb _ _"], preprocessing: Preprocessing
    ) -> Num[Tensor, "rgb height width"]:
        """Return a stored image, changed one by one; draws from torch's global generator."""
        if self.crop == "random_resized_crop":
            interpolation = v2.InterpolationMode(preprocessing.interpolation)
            crop = v2.RandomResizedCrop(preprocessing.size, interpolation=interpolation)
            pixels = crop(pixels)
        else:
            pixels = to_size(pixels, preprocessing)
        if self.randaugment:
            pixels = v2.RandAugment()(pixels)
        return pixels

    def draw(self, count: int, size: tuple[int, int], generator: torch.Generator) -> ShiftsAndFlips:
        """Return random shifts and flips for `count` images of this height and width."""
        is_shifted = self.crop == "random_crop"
        border = size[0] // 8 if is_shifted else 0, size[1] // 8 if is_shifted else 0
        top = torch.randint(2 * border[0] + 1, (count, 1), generator=generator)
        left = torch.randint(2 * border[1] + 1, (count, 1), generator=generator)
        flipped = torch.rand(count, 1, generator=generator) < 0.5
        return ShiftsAndFlips(border, top, left, flipped & self.flip)


@dataclass(frozen=True, eq=False)
class ShiftsAndFlips:
    """How each image of a batch is shifted and whether it is flipped."""

    border: tuple[int, int]
    """Rows above and below each image, and columns at its sides."""
    top: Tensor
    """The first row that is kept of the image with its border, `[image, 1]`."""
    left: Tensor
    """The first column, `[image, 1]`."""
    flipped: Tensor
    """bool `[image, 1]`."""

    def select(self, chosen: slice | Tensor) -> ShiftsAndFlips:
        """Return those of the chosen images."""
        return ShiftsAndFlips(
            self.border, self.top[chosen], self.left[chosen], self.flipped[chosen]
        )

    def apply(
        self, images: Float[Tensor, "image channel *position"]
    ) -> Float[Tensor, "image channel *position"]:
        """Return the shifted and flipped images, with zeros beyond their edges.

        Only pictures are changed: signals and volumes have no sides that may be mirrored.
        """
        if images.ndim != 4:
            return images
        count, channels, height, width = images.shape
        rows, columns = self.border
        padded = torch.nn.functional.pad(images, (columns, columns, rows, rows))
        x = self.left + torch.arange(width)  # [image, width]
        x = torch.where(self.flipped, x.flip(1), x)
        y = self.top + torch.arange(height)
        row_index = y[:, None, :, None].expand(count, channels, height, padded.shape[-1])
        column_index = x[:, None, None, :].expand(count, channels, height, width)
        return padded.gather(2, row_index).gather(3, column_index)


@dataclass(frozen=True, eq=False)
class AugmentedImages:
    """Images that are changed as they are read, each as its index and `seeds` alone determine."""

    images: Images
    augmentation: Augmentation
    seeds: tuple[int, ...]

    def read(
        self, indices: Indices, preprocessing: Preprocessing
    ) -> Num[Tensor, "image rgb height width"]:
        """Return the images at `indices`, resized and cropped; see `Images.read`."""
        changed = []
        with torch.random.fork_rng(devices=[]):
            originals = self.images.originals(indices)
            for index, pixels in zip(indices.tolist(), originals, strict=True):
                torch.manual_seed(seed_of(*self.seeds, index))
                changed.append(self.augmentation.augment(pixels, preprocessing))
        return torch.stack(changed)
