"""Images that are read by number, in memory or from files, and the batches made of them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import v2

from secateur.errors import DataError
from secateur.models import Preprocessing
from secateur.regions import ConceptMasks

Indices = Int[Tensor, "image"]


@runtime_checkable
class Images(Protocol):
    """A fixed list of labelled images."""

    @property
    def labels(self) -> Int[Tensor, "image"]:
        """int64 class numbers."""

    def read(
        self, indices: Indices, preprocessing: Preprocessing
    ) -> UInt8[Tensor, "image rgb height width"]:
        """The images with these numbers, resized and cropped; raises `DataError`."""

    def originals(self, indices: Indices) -> list[UInt8[Tensor, "rgb _ _"]]:
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
class FileImages:
    """Images that are decoded when they are asked for, on several threads."""

    paths: tuple[Path, ...]
    labels: Int[Tensor, "image"]

    def read(
        self, indices: Indices, preprocessing: Preprocessing
    ) -> UInt8[Tensor, "image rgb height width"]:
        """See `Images.read`."""

        def decode(index: int) -> Tensor:
            return to_size(_decode(self.paths[index]), preprocessing)

        with ThreadPoolExecutor() as pool:
            return torch.stack(list(pool.map(decode, indices.tolist())))

    def originals(self, indices: Indices) -> list[UInt8[Tensor, "rgb _ _"]]:
        """See `Images.originals`."""
        with ThreadPoolExecutor() as pool:
            return list(pool.map(lambda index: _decode(self.paths[index]), indices.tolist()))

    def take(self, indices: Indices) -> FileImages:
        """See `Images.take`."""
        return FileImages(tuple(self.paths[i] for i in indices.tolist()), self.labels[indices])


def _decode(path: Path) -> Tensor:
    try:
        with Image.open(path) as image:
            pixels: Tensor = v2.functional.pil_to_tensor(image.convert("RGB"))
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"the image {path} can't be read: {error}") from error
    return pixels


def to_size(
    pixels: Tensor,
    preprocessing: Preprocessing,
    interpolation: v2.InterpolationMode = v2.InterpolationMode.BILINEAR,
) -> Tensor:
    """Resized to the shorter side, then cropped at the centre, as torchvision does.

    Antialiased where the interpolation is bilinear. What the crop reaches over the edge is zero.
    """
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
) -> Iterator[Batch]:
    """Every image once, in the order of the list, in batches of `size`; the last may be smaller.

    Annotations come along where there are any. `shard` is a number and how many there are: only
    every so manieth image of the list from that one on, for several processes that go through one
    list. The next batch is read while the last one is in use. `data.training` has the batches to
    train on.
    """
    from secateur.data.annotated import AnnotatedImages  # which itself is made of images

    rank, shards = shard
    own = torch.arange(rank, len(images.labels), shards)
    chunks = [chunk for chunk in own.split(size) if len(chunk)]
    annotated = images if isinstance(images, AnnotatedImages) else None

    def read(indices: Tensor) -> Batch:
        return Batch(
            preprocessing.normalise(images.read(indices, preprocessing)),
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
            yield batch
