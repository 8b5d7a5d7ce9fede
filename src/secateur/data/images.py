"""Lists of labelled images, in memory or in files, that are read by index."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Num, UInt8
from torch import Tensor
from torchvision.transforms import v2

from secateur.data.preprocessing import Preprocessing
from secateur.data.unreadable import Unreadable, decode_all, read_batch

SIZES_LOOKED_AT = 64
"""Images that `stored_size` decodes at most."""
Indices = Int[Tensor, "image"]


@runtime_checkable
class Images(Protocol):
    """A fixed list of labelled images."""

    @property
    def labels(self) -> Int[Tensor, "image *label"]:
        """Class indices, int64; or 0 or 1 for each of several labels."""

    def read(
        self, indices: Indices, preprocessing: Preprocessing
    ) -> Num[Tensor, "image rgb height width"]:
        """Return the images at `indices`, resized and cropped.

        They are uint8, or floats that are normalised already. Raises `UnreadableImage` that names
        all images that can't be read, or another `DataError`.
        """

    def originals(self, indices: Indices) -> list[Num[Tensor, "rgb _ _"]]:
        """Return the images at `indices` in the sizes in which they are stored; see `read`."""

    def take(self, indices: Indices) -> Images:
        """Return a list of the images at `indices`."""


@dataclass(frozen=True, eq=False)
class TensorImages:
    """Images of one size, held in memory."""

    pixels: UInt8[Tensor, "image rgb height width"]
    labels: Int[Tensor, "image"]

    def read(
        self, indices: Indices, preprocessing: Preprocessing
    ) -> UInt8[Tensor, "image rgb height width"]:
        """Return the images at `indices`, resized and cropped; see `Images.read`."""
        pixels = self.pixels[indices]
        if pixels.shape[-2:] != (preprocessing.image_size, preprocessing.image_size):
            pixels = to_size(pixels, preprocessing)
        return pixels

    def originals(self, indices: Indices) -> list[UInt8[Tensor, "rgb _ _"]]:
        """Return the images at `indices` as they are stored; see `Images.originals`."""
        return list(self.pixels[indices])

    def take(self, indices: Indices) -> TensorImages:
        """Return a list of the images at `indices`; see `Images.take`."""
        return TensorImages(self.pixels[indices], self.labels[indices])


@dataclass(frozen=True, eq=False)
class NormalisedImages:
    """Images in memory, as a network takes them: with any channels and sides."""

    tensors: Float[Tensor, "image channel *position"]
    labels: Int[Tensor, "image *label"]

    def read(
        self, indices: Indices, preprocessing: Preprocessing
    ) -> Float[Tensor, "image channel *position"]:
        """Return the images as they are: they are neither resized nor normalised later."""
        del preprocessing
        return self.tensors[indices]

    def originals(self, indices: Indices) -> list[Float[Tensor, "channel *position"]]:
        """Return the images at `indices` as they are stored; see `Images.originals`."""
        return list(self.tensors[indices])

    def take(self, indices: Indices) -> NormalisedImages:
        """Return a list of the images at `indices`; see `Images.take`."""
        return NormalisedImages(self.tensors[indices], self.labels[indices])


@dataclass(frozen=True, eq=False)
class FileImages:
    """Image files, decoded when they are read, on several threads."""

    paths: tuple[Path, ...]
    labels: Int[Tensor, "image"]

    def read(
        self, indices: Indices, preprocessing: Preprocessing
    ) -> UInt8[Tensor, "image rgb height width"]:
        """Return the images at `indices`, resized and cropped; see `Images.read`."""
        prepare = functools.partial(to_size, preprocessing=preprocessing)
        return torch.stack(decode_all(indices, self._find, prepare))

    def originals(self, indices: Indices) -> list[UInt8[Tensor, "rgb _ _"]]:
        """Return the images at `indices` as they are stored; see `Images.originals`."""
        return decode_all(indices, self._find, lambda pixels: pixels)

    def _find(self, index: int) -> tuple[str, Path]:
        return str(self.paths[index]), self.paths[index]

    def take(self, indices: Indices) -> FileImages:
        """Return a list of the images at `indices`; see `Images.take`."""
        return FileImages(tuple(self.paths[i] for i in indices.tolist()), self.labels[indices])


def to_size(
    pixels: Tensor,
    preprocessing: Preprocessing,
    interpolation: v2.InterpolationMode | None = None,
) -> Tensor:
    """Return images resized to the shorter side, then cropped at the centre, as torchvision does.

    `interpolation` replaces the network's for tensors that aren't pictures. Bilinear and bicubic
    are antialiased. The crop is zero beyond an image's edges.
    """
    side = preprocessing.image_size
    if preprocessing.keeps_exact and pixels.shape[-2:] == (side, side):
        return pixels
    interpolation = interpolation or v2.InterpolationMode(preprocessing.interpolation)
    resized = v2.functional.resize(
        pixels, [preprocessing.resize], interpolation=interpolation, antialias=True
    )
    cropped: Tensor = v2.functional.center_crop(resized, [side])
    return cropped


def stored_size(images: Images) -> tuple[int, int] | None:
    """Return the height and width of images, or None if they differ or there are none.

    At most `SIZES_LOOKED_AT` are looked at, spread evenly, without those that can't be read.
    """
    count = len(images.labels)
    if not count:
        return None
    if isinstance(images, TensorImages):
        return int(images.pixels.shape[2]), int(images.pixels.shape[3])
    indices = torch.linspace(0, count - 1, min(count, SIZES_LOOKED_AT)).long()
    sizes: set[tuple[int, int]] = set()
    for few in indices.split(4):
        readable = read_batch(images.originals, few, Unreadable())
        for pixels in () if readable is None else readable[1]:
            sizes.add((int(pixels.shape[1]), int(pixels.shape[2])))
        if len(sizes) > 1:
            return None
    return next(iter(sizes), None)
