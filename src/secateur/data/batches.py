"""Batches of normalised images, with labels and annotations."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from secateur.data.annotated import AnnotatedImages
from secateur.data.concept_masks import ConceptMasks
from secateur.data.images import Images, NormalisedImages
from secateur.data.objects import Objects
from secateur.data.preprocessing import Preprocessing
from secateur.data.unreadable import Unreadable, read_batch


@dataclass(frozen=True, eq=False)
class Batch:
    """Normalised images with their labels, indices and annotations."""

    images: Float[Tensor, "image channel *position"]
    labels: Num[Tensor, "image *label"]
    """What the images are scored by: class numbers; 0 or 1 for each of several labels; masks of
    class numbers, `IGNORED` where there is none; or floats. See `Images.read_labels`."""
    indices: Int[Tensor, "image"]
    """Index of each image in the list that the batches are made from."""
    annotations: ConceptMasks | None = None
    """Regions that came with the images."""
    targets: tuple[Objects, ...] | None = None
    """The objects that each image shows, if they are annotated."""


def batches(
    images: Images,
    size: int,
    preprocessing: Preprocessing,
    *,
    shard: tuple[int, int] = (0, 1),
    unreadable: Unreadable | None = None,
) -> Iterator[Batch]:
    """Yield every image once, in order, in batches of `size`; the last may be smaller.

    Batches hold the annotations of `AnnotatedImages`. `shard` is `(rank, shards)`: the batches hold
    every `shards`-th image from `rank` on, so that several processes can share a list. The next
    batch is read while the last one is in use, unless the images are in memory as a network takes
    them: then it would only take memory. `training_stream` has the batches to train on.

    Raises `UnreadableImage` that names the images that can't be read. With `unreadable` they are
    noted there and left out of their batch instead.
    """
    rank, shards = shard
    local_shard = torch.arange(len(images.labels))[rank::shards]
    chunks = [chunk for chunk in local_shard.split(size) if len(chunk)]
    annotated = images if isinstance(images, AnnotatedImages) else None

    def read_all(part: Tensor) -> tuple[Tensor, Tensor]:
        return images.read(part, preprocessing), images.read_labels(part, preprocessing)

    def read(chunk: Tensor) -> Batch | None:
        readable = read_batch(read_all, chunk, unreadable)
        if readable is None:
            return None
        indices, (pixels, labels) = readable
        return Batch(
            preprocessing.normalise(pixels),
            labels,
            indices,
            annotated.regions(indices, preprocessing) if annotated else None,
            images.read_targets(indices, preprocessing),
        )

    if isinstance(images, NormalisedImages):
        # Nothing in memory is unreadable. No name holds a batch while the next one is read.
        yield from filter(None, map(read, chunks))
        return
    if not chunks:
        return
    with ThreadPoolExecutor(1) as pool:
        next_batch = pool.submit(read, chunks[0])
        for number in range(len(chunks)):
            batch = next_batch.result()
            if number + 1 < len(chunks):
                next_batch = pool.submit(read, chunks[number + 1])
            if batch is None:
                continue
            yield batch
