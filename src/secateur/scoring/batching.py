"""Batches of one size from batches of any sizes.

What a network computes for an image depends, in its last bits, on how many images go through it at
once. So images go through in batches of a size that depends on nothing but the images' size
(`images_at_a_time`), the last one filled up: then nothing depends on how the calibration set was
cut into batches or spread over processes. That holds for one machine and one number of threads;
another one may round differently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.data import Batch
from secateur.data.concept_masks import ConceptMasks, join_masks

PIXELS_AT_A_TIME = 2**20
"""The most pixels that go through the network at once, which bounds the memory."""
MOST_IMAGES_AT_A_TIME = 128


def images_at_a_time(*sides: int) -> int:
    """Return how many images with these sides go through the network at once: a power of two."""
    fitting = max(1, PIXELS_AT_A_TIME // math.prod(sides))
    return min(MOST_IMAGES_AT_A_TIME, 1 << (fitting.bit_length() - 1))


def rebatch(batches: Iterable[Batch]) -> Iterator[tuple[Batch, int]]:
    """Yield the same images in batches of one size, each with how many of its images count.

    Only the last batch has images that don't: copies of its last image fill it up.
    """
    waiting: list[Batch] = []
    for batch in batches:
        waiting.append(batch)
        size = images_at_a_time(*batch.images.shape[2:])
        while sum(len(part.images) for part in waiting) >= size:
            joined = _join(waiting)
            yield select_images(joined, torch.arange(size)), size
            waiting = [select_images(joined, torch.arange(size, len(joined.images)))]
    if waiting:
        rest = _join(waiting)
        count = len(rest.images)
        if count:
            size = images_at_a_time(*rest.images.shape[2:])
            yield select_images(rest, torch.arange(size).clamp(max=count - 1)), count


def select_images(batch: Batch, index: Tensor) -> Batch:
    """Return the images of a batch at the given places."""
    masks = batch.annotations
    if masks is not None:
        masks = ConceptMasks(masks.masks[index], masks.concepts[index])
    targets = batch.targets and tuple(batch.targets[place] for place in index.tolist())
    return Batch(batch.images[index], batch.labels[index], batch.indices[index], masks, targets)


def first_images(
    batches: Iterable[Batch], count: Callable[[tuple[int, ...]], int]
) -> Float[Tensor, "image ..."]:
    """Return the first images: as many, at most, as `count` says for their shape."""
    images: list[Tensor] = []
    left = None
    for batch in batches:
        if left is None:
            left = count(tuple(batch.images.shape[1:]))
        images.append(batch.images[:left])
        left -= len(images[-1])
        if left <= 0:
            break
    return torch.cat(images)


def _join(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    masks = [batch.annotations for batch in batches if batch.annotations is not None]
    targets = None
    if all(batch.targets is not None for batch in batches):
        targets = tuple(objects for batch in batches for objects in batch.targets or ())
    return Batch(
        torch.cat([batch.images for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
        torch.cat([batch.indices for batch in batches]),
        join_masks(masks) if masks else None,
        targets,
    )
