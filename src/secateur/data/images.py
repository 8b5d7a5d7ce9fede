"""Images that are read by number, in memory or from files, and the batches made of them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Num, UInt8
from torch import Tensor
from torchvision.transforms import v2

from secateur.data.concept_masks import ConceptMasks
from secateur.data.unreadable import Unreadable, decode_all, read_batch
from secateur.models.zoo import Preprocessing

Indices = Int[Tensor, "image"]


@runtime_checkable
class Images(Protocol):
    """A fixed list of labelled images."""

    @property
    def labels(self) -> Int[Tensor, "image"]:
        """int64 class numbers."""

    def read(
        self, indices: Indices, preprocessing: Preprocessing
    ) -> Num[Tensor, "image rgb height width"]:
        """The images with these numbers, resized and cropped.

        Of uint8, or of floats that are normalised already. Raises `UnreadableImage` that names all
        that can't be read, or another `DataError`.
        """

    def originals(self, indices: Indices) -> list[Num[Tensor, "rgb _ _"]]:
        """The images with these numbers at the sizes that they are stored in; as `read`."""

    def take(self, indices: Indices) -> Images:
        """The images with these numbers as a list of their own."""


@dataclass(frozen=True, eq=False)
class TensorImages:
    """Images of one size that are held in memory."""

    pixels: UInt8[Tensor, "image rgb height width"]
    labels: Int[Tensor, "image"]

    def read(
        self, indices: Indices, preprocessing: Preprocessing
    ) -> UInt8[Tensor, "image rgb height width"]:
        """See `Images.read`."""
        pixels = self.pixels[indices]
        if pixels.shape[-2:] != (preprocessing.image_size, preprocessing.image_size):
            pixels = to_size(pixels, preprocessing)
        return pixels

    def originals(self, indices: Indices) -> list[UInt8[Tensor, "rgb _ _"]]:
        """See `Images.originals`."""
        return list(self.pixels[indices])

    def take(self, indices: Indices) -> TensorImages:
        """See `Images.take`."""
        return TensorImages(self.pixels[indices], self.labels[indices])


@dataclass(frozen=True, eq=False)
class NormalisedImages:
    """Images in memory as a network takes them, of any channels and sides."""

    tensors: Float[Tensor, "image channel height width"]
    labels: Int[Tensor, "image"]

    def read(
        self, indices: Indices, preprocessing: Preprocessing
    ) -> Float[Tensor, "image channel height width"]:
        """The images as they are: neither resized nor, later, normalised."""
        del preprocessing
        return self.tensors[indices]

    def originals(self, indices: Indices) -> list[Float[Tensor, "channel height width"]]:
        """See `Images.originals`."""
        return list(self.tensors[indices])

    def take(self, indices: Indices) -> NormalisedImages:
        """See `Images.take`."""
        return NormalisedImages(self.tensors[indices], self.labels[indices])


@dataclass(frozen=True, eq=False)
class FileImages:
    """Images that are decoded when they are asked for, on several threads."""

    paths: tuple[Path, ...]
    labels: Int[Tensor, "image"]

    def read(
        self, indices: Indices, preprocessing: Preprocessing
    ) -> UInt8[Tensor, "image rgb height width"]:
        """See `Images.read`."""
        prepare = functools.partial(to_size, preprocessing=preprocessing)
        return torch.stack(decode_all(indices, self._find, prepare))

    def originals(self, indices: Indices) -> list[UInt8[Tensor, "rgb _ _"]]:
        """See `Images.originals`."""
        return decode_all(indices, self._find, lambda pixels: pixels)

    def _find(self, index: int) -> tuple[str, Path]:
        return str(self.paths[index]), self.paths[index]

    def take(self, indices: Indices) -> FileImages:
        """See `Images.take`."""
        return FileImages(tuple(self.paths[i] for i in indices.tolist()), self.labels[indices])


def to_size(
    pixels: Tensor,
    preprocessing: Preprocessing,
    interpolation: v2.InterpolationMode | None = None,
) -> Tensor:
    """Resized to the shorter side, then cropped at the centre, as torchvision does.

    By another `interpolation` than the network's for what is no picture. Antialiased where it is
    bilinear or bicubic. What the crop reaches over the edge is zero.
    """
    interpolation = interpolation or v2.InterpolationMode(preprocessing.interpolation)
    resized = v2.functional.resize(
        pixels, [preprocessing.resize], interpolation=interpolation, antialias=True
    )
    cropped: Tensor = v2.functional.center_crop(resized, [preprocessing.image_size])
    return cropped


@dataclass(frozen=True, eq=False)
class Batch:
    """Normalised images and what is known of them."""

    images: Float[Tensor, "image rgb height width"]
    labels: Int[Tensor, "image"]
    numbers: Int[Tensor, "image"]
    """Where each image is in the list that the batches are made of."""
    annotations: ConceptMasks | None = None
    """Regions that came with the images."""


def batches(
    images: Images,
    size: int,
    preprocessing: Preprocessing,
    *,
    shard: tuple[int, int] = (0, 1),
    unreadable: Unreadable | None = None,
) -> Iterator[Batch]:
    """Every image once, in the order of the list, in batches of `size`; the last may be smaller.

    Annotations come along where there are any. `shard` is a number and how many there are: only
    every so manieth image of the list from that one on, for several processes that go through one
    list. The next batch is read while the last one is in use. `data.training` has the batches to
    train on.

    An image that can't be read is an error that names it, unless there is `unreadable` to note it
    in: then its batch comes without it, or not at all where there is no other image in it.
    """
    from secateur.data.annotated import AnnotatedImages  # which itself is made of images

    rank, shards = shard
    own = torch.arange(len(images.labels))[rank::shards]
    chunks = [chunk for chunk in own.split(size) if len(chunk)]
    annotated = images if isinstance(images, AnnotatedImages) else None

    def read(chunk: Tensor) -> Batch | None:
        found = read_batch(lambda some: images.read(some, preprocessing), chunk, unreadable)
        if found is None:
            return None
        indices, pixels = found
        return Batch(
            preprocessing.normalise(pixels),
            images.labels[indices],
            indices,
            annotated.regions(indices, preprocessing) if annotated else None,
        )

    if not chunks:
        return
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(read, chunks[0])
        for number in range(len(chunks)):
            batch = coming.result()
            if number + 1 < len(chunks):
                coming = pool.submit(read, chunks[number + 1])
            if batch is None:
                continue
            yield batch
