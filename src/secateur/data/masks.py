"""Images with a mask for each: the class of every pixel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int, Num
from torch import Tensor
from torchvision.transforms import v2

from secateur.data.images import IGNORED, Indices, StoredImages, masks_to_size
from secateur.data.preprocessing import Preprocessing
from secateur.data.unreadable import decode_all, index_pixels
from secateur.runtime.errors import DataError

UNKNOWN = -2
"""Class or concept of a mask's value without a meaning."""
VOID = 255
"""Value of pixels without a class, unless the data says otherwise (VOC, Cityscapes, ADE20K)."""
MASKS_LOOKED_AT = 500
"""Masks that are read at most to learn which values they hold, if nothing names them."""
NOT_A_CLASS = frozenset({"ignore", "ignored", "null", "unlabeled", "unlabelled", "void"})
"""Names of values for pixels without a class, in lower case."""


@runtime_checkable
class Masks(Protocol):
    """The masks of a list of images."""

    def values(self, indices: Indices) -> list[Int[Tensor, "_ _"]]:
        """Return the values of the masks at `indices`, as they are stored.

        Raises `UnreadableImage` that names all masks that can't be read.
        """

    def name(self, index: int) -> str:
        """Return the name of a mask, for errors."""

    def take(self, indices: Indices) -> Masks:
        """Return a list of the masks at `indices`."""


@dataclass(frozen=True, eq=False)
class MaskFiles:
    """Index images, one for each image."""

    paths: tuple[Path, ...]

    def values(self, indices: Indices) -> list[Int[Tensor, "_ _"]]:
        """Return the values of the masks at `indices`; see `Masks.values`."""
        return decode_all(
            indices, lambda index: (self.name(index), self.paths[index]), index_pixels
        )

    def name(self, index: int) -> str:
        """Return the path of a mask."""
        return str(self.paths[index])

    def take(self, indices: Indices) -> MaskFiles:
        """Return a list of the masks at `indices`."""
        return MaskFiles(tuple(self.paths[index] for index in indices.tolist()))


@dataclass(frozen=True, eq=False)
class MaskedImages:
    """Images with a mask for each."""

    images: StoredImages
    masks: Masks
    class_of_value: Int[Tensor, "value"]
    """Class of each value of a mask from 0 on; `IGNORED`, or `UNKNOWN`, which is an error."""

    @property
    def labels(self) -> Int[Tensor, "image"]:
        """Zeros: an image has no class of its own."""
        return self.images.labels

    def read(
        self, indices: Indices, preprocessing: Preprocessing
    ) -> Num[Tensor, "image rgb height width"]:
        """Return the images at `indices`, resized and cropped; see `Images.read`."""
        return self.images.read(indices, preprocessing)

    def read_labels(
        self, indices: Indices, preprocessing: Preprocessing
    ) -> Int[Tensor, "image height width"]:
        """Return the class of each pixel of the input; see `Images.read_labels`."""
        masks = self.stored_masks(indices)
        return torch.stack([masks_to_size(mask[None], preprocessing)[0] for mask in masks])

    def stored_masks(self, indices: Indices) -> list[Int[Tensor, "_ _"]]:
        """Return the class of each pixel of the stored images at `indices`.

        A mask of another size than its image is resized to the nearest neighbour. Raises
        `DataError` if one has another shape or holds a value without a meaning.
        """
        sizes, values = self.images.sizes(indices), self.masks.values(indices)
        return [
            _to_image(self._classes(mask, index), size, self.masks.name(index))
            for index, mask, size in zip(indices.tolist(), values, sizes, strict=True)
        ]

    def read_targets(self, indices: Indices, preprocessing: Preprocessing) -> None:
        """Return None: no objects are annotated; see `Images.read_targets`."""
        del indices, preprocessing

    def originals(self, indices: Indices) -> list[Num[Tensor, "rgb _ _"]]:
        """Return the images at `indices` as they are stored; see `Images.originals`."""
        return self.images.originals(indices)

    def take(self, indices: Indices) -> MaskedImages:
        """Return a list of the images at `indices`; see `Images.take`."""
        images, masks = self.images.take(indices), self.masks.take(indices)
        return MaskedImages(images, masks, self.class_of_value)

    def _classes(self, values: Tensor, index: int) -> Tensor:
        known = len(self.class_of_value)
        is_inside = (values >= 0) & (values < known)
        classes = torch.where(is_inside, self.class_of_value[values.clamp(0, known - 1)], UNKNOWN)
        unknown = values[classes == UNKNOWN]
        if unknown.numel():
            raise DataError(
                f"the mask {self.masks.name(index)} holds the value {int(unknown.min())}, which is "
                "no class: name the classes in classes.json, or set data.ignore_index"
            )
        return classes


@dataclass(frozen=True, eq=False)
class Legend:
    """What the values of masks mean."""

    class_names: tuple[str, ...]
    """By value; a value at the end that is no class is left out."""
    class_of_value: Int[Tensor, "value"]
    """See `MaskedImages`."""


def legend_of(names: Sequence[str], ignored: int | None = None) -> Legend:
    """Return the legend of masks whose values from 0 on have these names.

    Pixels of the value `ignored`, of values with a name in `NOT_A_CLASS`, and of `VOID`, unless it
    has a name, count for nothing. Classes keep the numbers of their values.
    """
    classes = torch.full((max(len(names), VOID + 1, (ignored or 0) + 1),), UNKNOWN)
    classes[VOID] = IGNORED
    is_class = [name.lower() not in NOT_A_CLASS for name in names]
    for value in range(len(names)):
        classes[value] = value if is_class[value] else IGNORED
    if ignored is not None:
        classes[ignored] = IGNORED
    last = max((value for value in range(len(names)) if classes[value] != IGNORED), default=-1)
    return Legend(tuple(names[: last + 1]), classes)


def legend_of_values(counts: Counter[int], ignored: int | None, origin: Path | str) -> Legend:
    """Return the legend of masks with these values, which nothing names.

    0 and 255 alone are the background and one class. Of others 255 counts for nothing, and every
    value up to the largest is a class. Raises `DataError` if no class is left.
    """
    values = sorted(value for value in counts if value != ignored)
    if values == [0, VOID]:
        legend = legend_of(("background", "foreground"), ignored)
        legend.class_of_value[VOID] = 1
        return legend
    values = [value for value in values if value != VOID]
    if len(values) < 2 or values[0] < 0:
        shown = ", ".join(map(str, values)) or "none"
        raise DataError(f"the masks of {origin} show fewer than two classes: {shown}")
    return legend_of([f"class {value}" for value in range(values[-1] + 1)], ignored)


def count_values(masks: Masks, indices: Indices) -> Counter[int]:
    """Return how many of the masks at `indices` hold each value."""
    counts: Counter[int] = Counter()
    for few in indices.split(16):
        for values in masks.values(few):
            counts.update(_values_in(values))
    return counts


def _values_in(values: Tensor) -> list[int]:
    flat = values.flatten()
    if not len(flat) or int(flat.min()) < 0:
        return list(flat.unique().tolist())
    return list(flat.bincount().nonzero()[:, 0].tolist())  # much quicker


def _to_image(mask: Tensor, size: tuple[int, int], name: str) -> Tensor:
    """Return a mask in the size of its image; raises `DataError` if the shapes differ."""
    if mask.shape == size:
        return mask
    height, width = mask.shape
    if abs(height * size[1] - width * size[0]) > max(height, width, *size):  # a pixel's rounding
        raise DataError(f"the mask {name} is {width}×{height}, its image {size[1]}×{size[0]}")
    nearest = v2.InterpolationMode.NEAREST_EXACT
    resized: Tensor = v2.functional.resize(
        (mask - IGNORED).float()[None], [*size], interpolation=nearest
    )
    return resized[0].long() + IGNORED
