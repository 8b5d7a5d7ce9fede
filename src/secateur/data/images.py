"""Lists of labelled images, in memory or in files, that are read by index."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Num, UInt8
from torch import Tensor
from torchvision.transforms import v2

from secateur.data.objects import Objects
from secateur.data.preprocessing import Geometry, Preprocessing
from secateur.data.tensor_list import TensorList, tensor_list
from secateur.data.unreadable import (
    Unreadable,
    decode_all,
    height_and_width,
    read_batch,
    rgb_pixels,
)

SIZES_LOOKED_AT = 64
"""Images that `stored_size` decodes at most."""
IGNORED = -1
"""Class of a mask's pixels that count for nothing."""
Indices = Int[Tensor, "image"]


@runtime_checkable
class Images(Protocol):
    """A fixed list of labelled images."""

    @property
    def labels(self) -> Int[Tensor, "image *label"]:
        """Class indices, int64; or 0 or 1 for each of several labels; or zeros if there are none.

        Images are counted and stratified by these.
        """

    def read(
        self, indices: Indices, preprocessing: Preprocessing
    ) -> Num[Tensor, "image rgb height width"]:
        """Return the images at `indices`, resized and cropped.

        They are uint8, or floats that are normalised already. Raises `UnreadableImage` that names
        all images that can't be read, or another `DataError`.
        """

    def read_labels(
        self, indices: Indices, preprocessing: Preprocessing
    ) -> Num[Tensor, "image *label"]:
        """Return what the images at `indices` are scored by, in the geometry of `read`.

        Those are `labels`; or masks `[image, height, width]`, int64, of a class for each pixel,
        `IGNORED` where there is none; or floats to regress. Raises as `read` does.
        """

    def read_targets(
        self, indices: Indices, preprocessing: Preprocessing
    ) -> tuple[Objects, ...] | None:
        """Return the objects that each image at `indices` shows; None if they aren't annotated."""

    def originals(self, indices: Indices) -> list[Num[Tensor, "rgb _ _"]]:
        """Return the images at `indices` in the sizes in which they are stored; see `read`."""

    def take(self, indices: Indices) -> Images:
        """Return a list of the images at `indices`."""


@runtime_checkable
class StoredImages(Images, Protocol):
    """Images whose sizes can be told without decoding them."""

    def sizes(self, indices: Indices) -> list[tuple[int, int]]:
        """Return the heights and widths of the images at `indices`, as they are stored."""

    def name(self, index: int) -> str:
        """Return the name of an image, for errors."""

    def take(self, indices: Indices) -> StoredImages:
        """Return a list of the images at `indices`; see `Images.take`."""


class LabelledImages:
    """Images whose labels don't depend on how they are read."""

    labels: Int[Tensor, "image *label"]

    def read_labels(
        self, indices: Indices, preprocessing: Preprocessing
    ) -> Int[Tensor, "image *label"]:
        """Return the labels of the images at `indices`; see `Images.read_labels`."""
        del preprocessing
        return self.labels[indices]

    def read_targets(self, indices: Indices, preprocessing: Preprocessing) -> None:
        """Return None: no objects are annotated; see `Images.read_targets`."""
        del indices, preprocessing


@dataclass(frozen=True, eq=False)
class TensorImages(LabelledImages):
    """Images of one size, held in memory."""

    pixels: UInt8[Tensor, "image rgb height width"] | TensorList
    labels: Int[Tensor, "image"]

    def read(
        self, indices: Indices, preprocessing: Preprocessing
    ) -> UInt8[Tensor, "image rgb height width"]:
        """Return the images at `indices`, resized and cropped; see `Images.read`."""
        pixels = self.pixels[indices]
        if pixels.shape[-2:] != preprocessing.size:
            pixels = to_size(pixels, preprocessing)
        return pixels

    def originals(self, indices: Indices) -> list[UInt8[Tensor, "rgb _ _"]]:
        """Return the images at `indices` as they are stored; see `Images.originals`."""
        return list(self.pixels[indices])

    def take(self, indices: Indices) -> TensorImages:
        """Return a list of the images at `indices`; see `Images.take`."""
        return TensorImages(tensor_list(self.pixels).take(indices), self.labels[indices])


@dataclass(frozen=True, eq=False)
class NormalisedImages:
    """Images in memory, as a network takes them: with any channels and sides."""

    tensors: Float[Tensor, "image channel *position"] | TensorList
    labels: Int[Tensor, "image *label"]
    values: Num[Tensor, "image *value"] | TensorList | None = None
    """What images are scored by instead of `labels`: masks or floats; see `Images.read_labels`."""

    def read(
        self, indices: Indices, preprocessing: Preprocessing
    ) -> Float[Tensor, "image channel *position"]:
        """Return the images as they are: they are neither resized nor normalised later."""
        del preprocessing
        return self.tensors[indices]

    def read_labels(
        self, indices: Indices, preprocessing: Preprocessing
    ) -> Num[Tensor, "image *label"]:
        """Return the values of the images at `indices`, else their labels."""
        del preprocessing
        return (self.labels if self.values is None else self.values)[indices]

    def read_targets(self, indices: Indices, preprocessing: Preprocessing) -> None:
        """Return None: no objects are annotated; see `Images.read_targets`."""
        del indices, preprocessing

    def originals(self, indices: Indices) -> list[Float[Tensor, "channel *position"]]:
        """Return the images at `indices` as they are stored; see `Images.originals`."""
        return list(self.tensors[indices])

    def take(self, indices: Indices) -> NormalisedImages:
        """Return a list of the images at `indices`; see `Images.take`."""
        values = None if self.values is None else tensor_list(self.values).take(indices)
        return NormalisedImages(
            tensor_list(self.tensors).take(indices), self.labels[indices], values
        )


@dataclass(frozen=True, eq=False)
class FileImages(LabelledImages):
    """Image files, decoded when they are read, on several threads."""

    paths: tuple[Path, ...]
    labels: Int[Tensor, "image"]

    def read(
        self, indices: Indices, preprocessing: Preprocessing
    ) -> UInt8[Tensor, "image rgb height width"]:
        """Return the images at `indices`, resized and cropped; see `Images.read`."""
        pixels = decode_all(
            indices, self._find, lambda image: to_size(rgb_pixels(image), preprocessing)
        )
        return torch.stack(pixels)

    def originals(self, indices: Indices) -> list[UInt8[Tensor, "rgb _ _"]]:
        """Return the images at `indices` as they are stored; see `Images.originals`."""
        return decode_all(indices, self._find, rgb_pixels)

    def sizes(self, indices: Indices) -> list[tuple[int, int]]:
        """Return the heights and widths of the images at `indices`; see `StoredImages.sizes`."""
        return decode_all(indices, self._find, height_and_width)

    def name(self, index: int) -> str:
        """Return the path of an image."""
        return str(self.paths[index])

    def _find(self, index: int) -> tuple[str, Path]:
        return self.name(index), self.paths[index]

    def take(self, indices: Indices) -> FileImages:
        """Return a list of the images at `indices`; see `Images.take`."""
        return FileImages(tuple(self.paths[i] for i in indices.tolist()), self.labels[indices])


def to_size(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return images in the size of the network's input, as `Preprocessing.fit` says.

    Bilinear and bicubic resizing is antialiased, as torchvision's. A crop is zero beyond an image's
    edges.
    """
    interpolation = v2.InterpolationMode(preprocessing.interpolation)
    fill = preprocessing.pad_value if preprocessing.fit == "letterbox" else 0
    return _to_size(pixels, preprocessing, interpolation, fill)


def masks_to_size(
    masks: Int[Tensor, "*image height width"], preprocessing: Preprocessing
) -> Int[Tensor, "*image row column"]:
    """Return whole numbers by pixel as `to_size` returns their images, `IGNORED` beyond the edges.

    They are resized to the nearest neighbour, by pixel centres.
    """
    shifted = (masks - IGNORED).float()  # the crop pads with zeros
    nearest = v2.InterpolationMode.NEAREST_EXACT
    return _to_size(shifted, preprocessing, nearest, 0).long() + IGNORED


def _to_size(
    pixels: Tensor, preprocessing: Preprocessing, interpolation: v2.InterpolationMode, fill: int
) -> Tensor:
    height, width = pixels.shape[-2:]
    size, geometry = preprocessing.size, preprocessing.geometry(height, width)
    if geometry == Geometry() and (height, width) == size:
        return pixels
    resized = v2.functional.resize(
        pixels,
        [*preprocessing.resized(height, width)],
        interpolation=interpolation,
        antialias=True,
    )
    left, top = int(geometry.offset_x), int(geometry.offset_y)
    right, bottom = (
        outer - inner - start
        for outer, inner, start in (
            (size[1], resized.shape[-1], left),
            (size[0], resized.shape[-2], top),
        )
    )
    padding = (left, right, top, bottom)  # negative: cropped
    return torch.nn.functional.pad(resized, padding, value=fill)


def stored_size(images: Images) -> tuple[int, int] | None:
    """Return the height and width of images, or None if they differ or there are none.

    At most `SIZES_LOOKED_AT` are looked at, spread evenly, without those that can't be read.
    """
    count = len(images.labels)
    if not count:
        return None
    if isinstance(images, TensorImages):
        return int(images.pixels.shape[2]), int(images.pixels.shape[3])
    if isinstance(images, NormalisedImages) and images.tensors.ndim != 4:
        return None  # signals and volumes
    indices = torch.linspace(0, count - 1, min(count, SIZES_LOOKED_AT)).long()
    sizes: set[tuple[int, int]] = set()
    for few in indices.split(4):
        readable = read_batch(images.originals, few, Unreadable())
        for pixels in () if readable is None else readable[1]:
            sizes.add((int(pixels.shape[1]), int(pixels.shape[2])))
        if len(sizes) > 1:
            return None
    return next(iter(sizes), None)
