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
MOST_IMAGES_AT_A_TIME = 64
"""So that small maps stay in a processor's cache."""


def images_at_a_time(*sides: int) -> int:
    """Return how many images with these sides go through the network at once: a power of two."""
    fitting = max(1, PIXELS_AT_A_TIME // math.prod(sides))
    return min(MOST_IMAGES_AT_A_TIME, 1 << (fitting.bit_length() - 1))


def rebatch(batches: Iterable[Batch]) -> Iterator[tuple[Batch, int]]:
    """Yield the same images in batches of one size, each with how many of its images count.

    Only the last batch has images that don't: copies of its last image fill it up.
    """
    rest: Batch | None = None
    for batch in batches:
        size, start, count = images_at_a_time(*batch.images.shape[2:]), 0, len(batch.images)
        if rest is not None:
            start = min(size - len(rest.images), count)
            rest = _join(rest, _slice(batch, slice(start)))
            if len(rest.images) < size:
                continue
            yield rest, size
            rest = None
        while start + size <= count:
            yield _slice(batch, slice(start, start + size)), size
            start += size
        if start < count:
            rest = _slice(batch, slice(start, None))
    if rest is not None:
        count = len(rest.images)
        size = images_at_a_time(*rest.images.shape[2:])
        yield select_images(rest, torch.arange(size).clamp(max=count - 1)), count


def select_images(batch: Batch, index: Tensor) -> Batch:
    """Return the images of a batch at the given places."""
    masks = batch.annotations
    if masks is not None:
        masks = ConceptMasks(masks.masks[index], masks.concepts[index])
    targets = batch.targets and tuple(batch.targets[place] for place in index.tolist())
    return Batch(batch.images[index], batch.labels[index], batch.indices[index], masks, targets)


def _slice(batch: Batch, part: slice) -> Batch:
    """Return consecutive images of a batch, which share its memory."""
    masks = batch.annotations
    if masks is not None:
        masks = ConceptMasks(masks.masks[part], masks.concepts[part])
    targets = batch.targets and batch.targets[part]
    return Batch(batch.images[part], batch.labels[part], batch.indices[part], masks, targets)


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


def _join(first: Batch, second: Batch) -> Batch:
    masks = [part.annotations for part in (first, second) if part.annotations is not None]
    targets = None
    if first.targets is not None and second.targets is not None:
        targets = (*first.targets, *second.targets)
    return Batch(
        torch.cat([first.images, second.images]),
        torch.cat([first.labels, second.labels]),
        torch.cat([first.indices, second.indices]),
        join_masks(masks) if masks else None,
        targets,
    )
