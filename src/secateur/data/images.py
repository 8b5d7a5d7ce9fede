"""Images that are read by number, in memory or from files, and the batches made of them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torchvision.transforms import v2

from secateur.data.unreadable import Unreadable, decode_all, read_batch
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
        """The images with these numbers, resized and cropped.

        Raises `UnreadableImage` that names all that can't be read, or another `DataError`.
        """

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

        def find(index: int) -> tuple[str, Path]:
            return str(self.paths[index]), self.paths[index]

        return torch.stack(decode_all(indices, find, lambda one: to_size(one, preprocessing)))

    def take(self, indices: Indices) -> FileImages:
        """See `Images.take`."""
        return FileImages(tuple(self.paths[i] for i in indices.tolist()), self.labels[indices])


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


@dataclass(frozen=True)
class Augmentation:
    """Random changes that leave an image's class as it is.

    Each image is shifted by up to an eighth of its side, over a border of zeros, and with `flip`
    half of them are mirrored, as He et al. (2016, section 4.2) train on CIFAR.
    """

    flip: bool = True

    def apply(
        self,
        images: Float[Tensor, "image rgb height width"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "image rgb height width"]:
        """The changed images; each one is changed by its own draw."""
        count, channels, height, width = images.shape
        border = height // 8
        padded = torch.nn.functional.pad(images, 4 * [border])
        top = torch.randint(2 * border + 1, (count, 1), generator=generator)
        left = torch.randint(2 * border + 1, (count, 1), generator=generator)
        columns = left + torch.arange(width)  # [image, width]
        if self.flip:
            flipped = torch.rand(count, 1, generator=generator) < 0.5
            columns = torch.where(flipped, columns.flip(1), columns)
        rows = top + torch.arange(height)
        row_index = rows[:, None, :, None].expand(count, channels, height, padded.shape[-1])
        column_index = columns[:, None, None, :].expand(count, channels, height, width)
        return padded.gather(2, row_index).gather(3, column_index)


def batches(
    images: Images,
    size: int,
    preprocessing: Preprocessing,
    *,
    shuffle: torch.Generator | None = None,
    augment: Augmentation | None = None,
    shard: tuple[int, int] = (0, 1),
    unreadable: Unreadable | None = None,
) -> Iterator[Batch]:
    """Every image once, in batches of `size`; the last one may be smaller.

    In the order of the list, or in a random order from `shuffle`, which `augment` draws from too.
    Annotations come along where there are any, but not with augmented images. `shard` is a number
    and how many there are: only every so manieth image of the list from that one on, for several
    processes that go through one list. The next batch is read while the last one is in use.

    An image that can't be read is an error that names it, unless there is `unreadable` to note it
    in: then its batch comes without it, or not at all where there is no other image in it.
    """
    from secateur.data.annotated import AnnotatedImages  # which itself is made of images

    rank, shards = shard
    assert shards == 1 or (shuffle is None and augment is None)
    count = len(images.labels)
    order = torch.randperm(count, generator=shuffle) if shuffle else torch.arange(count)
    chunks = [chunk for chunk in order[rank::shards].split(size) if len(chunk)]
    annotated = images if isinstance(images, AnnotatedImages) and augment is None else None

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
            if augment is not None:
                batch = replace(batch, images=augment.apply(batch.images, shuffle))
            yield batch
