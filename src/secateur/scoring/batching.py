"""Brings batches of any size to one size.

What a network computes for an image depends, in its last bits, on how many images go through it at
once. So images go through in batches of a size that depends on nothing but the images' size
(`images_at_a_time`), the last one filled up: then nothing depends on how the calibration set was
cut into batches or spread over processes. That holds for one machine and one number of threads;
another one may round differently.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from secateur.data import Batch
from secateur.data.concept_masks import ConceptMasks, join_masks

PIXELS_AT_A_TIME = 2**20
"""Bounds the images that go through the network at once, and with them the memory."""
MOST_IMAGES_AT_A_TIME = 128


def images_at_a_time(height: int, width: int) -> int:
    """How many images go through the network at once: a power of two."""
    fitting = max(1, PIXELS_AT_A_TIME // (height * width))
    return min(MOST_IMAGES_AT_A_TIME, 1 << (fitting.bit_length() - 1))


def rebatch(batches: Iterable[Batch]) -> Iterator[tuple[Batch, int]]:
    """The same images in batches of the one size, with how many of each are images to count."""
    waiting: list[Batch] = []
    for batch in batches:
        waiting.append(batch)
        size = images_at_a_time(*batch.images.shape[2:])
        while sum(len(each.images) for each in waiting) >= size:
            joined = _joined(waiting)
            yield select_images(joined, torch.arange(size)), size
            waiting = [select_images(joined, torch.arange(size, len(joined.images)))]
    if waiting:
        rest = _joined(waiting)
        count = len(rest.images)
        if count:
            size = images_at_a_time(*rest.images.shape[2:])
            yield select_images(rest, torch.arange(size).clamp(max=count - 1)), count


def select_images(batch: Batch, images: Tensor) -> Batch:
    """Some images of a batch, by their place in it."""
    found = batch.annotations
    some = None if found is None else ConceptMasks(found.masks[images], found.concepts[images])
    return Batch(batch.images[images], batch.labels[images], batch.indices[images], some)


def _joined(batches: list[Batch]) -> Batch:
    """Several batches as one."""
    if len(batches) == 1:
        return batches[0]
    annotations = [each.annotations for each in batches if each.annotations is not None]
    return Batch(
        torch.cat([each.images for each in batches]),
        torch.cat([each.labels for each in batches]),
        torch.cat([each.indices for each in batches]),
        join_masks(annotations) if annotations else None,
    )
