"""Batches of images, with labels and annotations."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.data.concept_masks import ConceptMasks
from secateur.data.images import Images
from secateur.data.preprocessing import Preprocessing
from secateur.data.unreadable import Unreadable, read_batch
from secateur.errors import DataError


@dataclass(frozen=True, eq=False)
class Batch:
    """Normalised images and what is known of them."""

    images: Float[Tensor, "image rgb height width"]
    labels: Int[Tensor, "image"]
    indices: Int[Tensor, "image"]
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
    every n-th image of the list from that one on, for several processes that go through one
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


def check_labels(labels: Tensor, classes: int) -> None:
    """Raises `DataError` where a label lies outside the network's classes."""
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise DataError(
            f"the data has a class number {int(outside[0])}, but the network tells "
            f"{classes} classes apart"
        )
