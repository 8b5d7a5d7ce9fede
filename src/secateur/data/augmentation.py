"""Random changes of training images that keep an image's class: crops, flips, RandAugment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor
from torchvision.transforms import v2

from secateur.config import Crop
from secateur.data.images import IGNORED, Images, Indices, masks_to_size, to_size
from secateur.data.images_with_objects import ImagesWithObjects
from secateur.data.masks import MaskedImages
from secateur.data.objects import Objects
from secateur.data.preprocessing import Geometry, Preprocessing
from secateur.runtime.errors import DataError
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
    def is_cropped(self) -> bool:
        """Whether a random part of the stored image becomes the input."""
        return self.crop == "random_resized_crop"

    @property
    def is_imagewise(self) -> bool:
        """Whether images are changed one by one, before they are normalised and batched."""
        return self.is_cropped or self.randaugment

    def draw_crop(
        self, pixels: Num[Tensor, "rgb _ _"], preprocessing: Preprocessing
    ) -> RandomCrop | None:
        """Return the part of a stored image that becomes the input, or None if that is not random.

        Draws from torch's global generator.
        """
        if not self.is_cropped:
            return None
        crop = v2.RandomResizedCrop(preprocessing.size)
        part = crop.make_params([pixels])
        return RandomCrop(part["top"], part["left"], part["height"], part["width"])

    def augment(
        self,
        pixels: Num[Tensor, "rgb _ _"],
        preprocessing: Preprocessing,
        crop: RandomCrop | None,
    ) -> Num[Tensor, "rgb height width"]:
        """Return a stored image, changed one by one; draws from torch's global generator."""
        if crop is not None:
            interpolation = v2.InterpolationMode(preprocessing.interpolation)
            pixels = crop.apply(pixels, preprocessing.size, interpolation)
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


@dataclass(frozen=True)
class RandomCrop:
    """The part of a stored image that becomes the input, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def apply(
        self, pixels: Tensor, size: tuple[int, int], interpolation: v2.InterpolationMode
    ) -> Tensor:
        """Return the part of an image, resized."""
        part = (self.top, self.left, self.height, self.width)
        resized: Tensor = v2.functional.resized_crop(
            pixels, *part, [*size], interpolation=interpolation, antialias=True
        )
        return resized

    def apply_to_mask(
        self, mask: Int[Tensor, "_ _"], size: tuple[int, int]
    ) -> Int[Tensor, "height width"]:
        """Return the part of a mask, resized to the nearest neighbour."""
        nearest = v2.InterpolationMode.NEAREST_EXACT
        return self.apply(mask.float()[None], size, nearest)[0].long()

    def geometry(self, size: tuple[int, int]) -> Geometry:
        """Return where the stored image lies in the input."""
        x, y = size[1] / self.width, size[0] / self.height
        return Geometry(x, y, -self.left * x, -self.top * y)


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
        return self._gather(images, 0)

    def apply_to_labels(
        self, labels: Num[Tensor, "image *label"], images: Float[Tensor, "image channel *position"]
    ) -> Num[Tensor, "image *label"]:
        """Return labels by position shifted and flipped as the images are, others as they are.

        Those are masks, which hold whole numbers and are `IGNORED` beyond the edges, and floats
        `[image, channel, height, width]`, or of the images' height and width, which are 0 there.
        Raises `DataError` if they can't be shifted, since their size is no multiple of the images'.
        """
        size, own_size = images.shape[-2:], labels.shape[-2:]
        is_map = labels.ndim >= (4 if labels.is_floating_point() else 3) or own_size == size
        if images.ndim != 4 or labels.ndim < 3 or not is_map:
            return labels
        border = 0 if labels.is_floating_point() else IGNORED
        maps = labels.reshape(len(labels), -1, *own_size)
        return self._scaled(size, own_size)._gather(maps, border).reshape(labels.shape)

    def _scaled(self, size: torch.Size, own_size: torch.Size) -> ShiftsAndFlips:
        """Return the same moves of maps that have another size than the images."""
        if own_size == size or not any(self.border):
            return self
        rows, columns = (
            image_moves // side for image_moves, side in zip(own_size, size, strict=True)
        )
        if own_size != (rows * size[0], columns * size[1]):
            raise DataError(
                f"labels of {list(own_size)} can't be shifted with images of {list(size)}: set "
                "finetune.crop (or train.crop) to none"
            )
        border = (rows * self.border[0], columns * self.border[1])
        return replace(self, border=border, top=rows * self.top, left=columns * self.left)

    def move(self, objects: Sequence[Objects], width: int) -> tuple[Objects, ...]:
        """Return the objects of the images, whose inputs are so wide, in their new places."""
        moved = []
        for place, one in enumerate(objects):
            x = float(self.border[1] - self.left[place])
            y = float(self.border[0] - self.top[place])
            is_flipped = bool(self.flipped[place])
            move = Geometry(-1, 1, width - x, y) if is_flipped else Geometry(1, 1, x, y)
            moved.append(replace(one, geometry=one.geometry.then(move)))
        return tuple(moved)

    def _gather(self, images: Tensor, border: int) -> Tensor:
        count, channels, height, width = images.shape
        rows, columns = self.border
        padded = torch.nn.functional.pad(images, (columns, columns, rows, rows), value=border)
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
    ) -> tuple[Num[Tensor, "image rgb height width"], Tensor, tuple[Objects, ...] | None]:
        """Return the images at `indices`, resized and cropped, with their labels and objects.

        See `read`, `read_labels` and `read_targets` of `Images`.
        """
        source, size = self.images, preprocessing.size
        stored = source.stored_masks(indices) if isinstance(source, MaskedImages) else None
        changed, masks, geometries, sizes = [], [], [], []
        with torch.random.fork_rng(devices=[]):
            originals = source.originals(indices)
            for place, (index, pixels) in enumerate(zip(indices.tolist(), originals, strict=True)):
                torch.manual_seed(seed_of(*self.seeds, index))
                crop = self.augmentation.draw_crop(pixels, preprocessing)
                changed.append(self.augmentation.augment(pixels, preprocessing, crop))
                if stored is not None:
                    masks.append(
                        masks_to_size(stored[place][None], preprocessing)[0]
                        if crop is None
                        else crop.apply_to_mask(stored[place], size)
                    )
                height, width = pixels.shape[-2:]
                sizes.append((height, width))
                geometries.append(
                    preprocessing.geometry(height, width) if crop is None else crop.geometry(size)
                )
        labels = torch.stack(masks) if masks else source.read_labels(indices, preprocessing)
        if labels.is_floating_point() and labels.ndim >= 3 and self.augmentation.is_cropped:
            raise DataError(
                "random_resized_crop would not change the pictures that images are labelled with: "
                "set finetune.crop (or train.crop) to none"
            )
        objects = None
        if isinstance(source, ImagesWithObjects):
            objects = source.place(indices, geometries, sizes)
        return torch.stack(changed), labels, objects
