"""Splits of a data set, held-out images and seeded draws."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from secateur.data.images import Images
from secateur.runtime.errors import DataError

LabelKind = Literal["classes", "masks", "objects", "values", "none"]
"""What images come with: a class or several labels each; a mask of a class for each pixel; objects
in boxes; numbers to regress; or nothing."""
TEST_FRACTION = 0.2
"""Of each class, held out of data without a test part."""
HELD_OUT_EVERY = 5
"""Every n-th calibration image is held out; the others are fitted to."""


@dataclass(frozen=True)
class Splits:
    """What a reader returns: training and test images, and the class names."""

    class_names: tuple[str, ...]
    train: Images
    test: Images
    notes: tuple[str, ...] = ()
    """What was not read, a sentence each."""
    origin: str = ""
    """Where the test part comes from, if not from a part of that name."""
    kind: LabelKind = "classes"


def check_labelling(
    labels: Int[Tensor, "..."], images: int, classes: int, origin: Path | str
) -> None:
    """Raise `DataError`, naming `origin`, unless every image has a label below `classes`."""
    if not images:
        raise DataError(f"{origin} holds no images")
    if labels.shape != (images,):
        raise DataError(f"{origin} has {images} images but {labels.numel()} labels")
    if int(labels.max()) >= classes or int(labels.min()) < 0:
        raise DataError(f"{origin} has a label outside 0 to {classes - 1}")


def hold_out(images: Images, fraction: float, generator: torch.Generator) -> tuple[Images, Images]:
    """Return the images without a stratified random fraction of them, and that fraction.

    At least one image of each class is held out. Raises `DataError` if a class has too few.
    """
    chosen: list[Tensor] = []
    labels = _strata(images)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0]
        count = max(1, round(fraction * len(members)))
        if count >= len(members):
            raise DataError(
                f"class {label} has {len(members)} images: too few to hold out {count} of them"
            )
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    mask = torch.zeros(len(images.labels), dtype=torch.bool)
    mask[torch.cat(chosen)] = True
    return images.take((~mask).nonzero()[:, 0]), images.take(mask.nonzero()[:, 0])


def hold_out_fifth(images: Images) -> tuple[Images, Images]:
    """Return images without a fifth of each class, and that fifth, for a test part.

    It is always the same. Raises `DataError` if a class has too few.
    """
    return hold_out(images, TEST_FRACTION, torch.Generator().manual_seed(0))


def draw(images: Images, count: int, generator: torch.Generator, *, stratified: bool) -> Images:
    """Return `count` images in random order; see `data.draw_calibration_images`."""
    order = torch.randperm(len(images.labels), generator=generator)
    if stratified:
        # Each image's rank among those of its class in the random order: the lowest ranks first.
        labels = _strata(images)[order]
        rank = torch.zeros_like(labels)
        for label in labels.unique().tolist():
            members = labels == label
            rank[members] = torch.arange(int(members.sum()))
        order = order[rank.argsort(stable=True)]
    return images.take(order[:count])


def _strata(images: Images) -> Int[Tensor, "image"]:
    """Return the class of each image; zeros if each has several labels."""
    return images.labels if images.labels.ndim == 1 else torch.zeros(len(images.labels)).long()


def is_held_out(indices: Int[Tensor, "image"]) -> Bool[Tensor, "image"]:
    """Return which calibration images are held out, by their index in the calibration set."""
    return indices % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def split_calibration(images: Images) -> tuple[Images, Images]:
    """Return the calibration images to fit to, and those held out; see `is_held_out`.

    Of fewer than `HELD_OUT_EVERY` images none is held out: then both are all of them.
    """
    mask = is_held_out(torch.arange(len(images.labels)))
    if not mask.any():
        return images, images
    return images.take((~mask).nonzero()[:, 0]), images.take(mask.nonzero()[:, 0])
