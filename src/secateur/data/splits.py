"""Parts of a data set, and seeded choices of images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from secateur.data.images import Images
from secateur.errors import DataError

HELD_OUT_EVERY = 5
"""Every n-th calibration image is held out of what the others are fitted to."""


@dataclass(frozen=True)
class Splits:
    """What a reader finds: training and test images, and the names of the classes."""

    class_names: tuple[str, ...]
    train: Images
    test: Images


def check_labelling(
    labels: Int[Tensor, "..."], images: int, classes: int, origin: Path | str
) -> None:
    """Raises `DataError` that names `origin` where not every image has a label from 0 on."""
    if not images:
        raise DataError(f"{origin} holds no images")
    if labels.shape != (images,):
        raise DataError(f"{origin}: {images} images but {labels.numel()} labels")
    if int(labels.max()) >= classes or int(labels.min()) < 0:
        raise DataError(f"{origin}: a label lies outside 0 to {classes - 1}")


def hold_out(images: Images, fraction: float, generator: torch.Generator) -> tuple[Images, Images]:
    """The images without, and only, a stratified random share of at least one image a class.

    Raises `DataError` where a class has too few images to share.
    """
    chosen: list[Tensor] = []
    for label in images.labels.unique().tolist():
        members = (images.labels == label).nonzero()[:, 0]
        count = max(1, round(fraction * len(members)))
        if count >= len(members):
            raise DataError(
                f"class {label} has {len(members)} images: too few to hold {count} out of them"
            )
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    mask = torch.zeros(len(images.labels), dtype=torch.bool)
    mask[torch.cat(chosen)] = True
    return images.take((~mask).nonzero()[:, 0]), images.take(mask.nonzero()[:, 0])


def draw(images: Images, count: int, generator: torch.Generator, *, stratified: bool) -> Images:
    """`count` images in random order; see `data.draw_probe`."""
    order = torch.randperm(len(images.labels), generator=generator)
    if stratified:
        # Each image's rank among those of its class in the random order: the lowest ranks first.
        labels = images.labels[order]
        rank = torch.zeros_like(labels)
        for label in labels.unique().tolist():
            members = labels == label
            rank[members] = torch.arange(int(members.sum()))
        order = order[rank.argsort(stable=True)]
    return images.take(order[:count])


def is_held_out(numbers: Int[Tensor, "image"]) -> Bool[Tensor, "image"]:
    """Whether calibration images, by their number in the calibration set, are held out to choose
    by."""
    return numbers % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def split_calibration(probe: Images) -> tuple[Images, Images]:
    """The calibration images to fit to, and those that are held out; see `is_held_out`.

    Of fewer than `HELD_OUT_EVERY` images none is held out: both are all of them.
    """
    mask = is_held_out(torch.arange(len(probe.labels)))
    if not mask.any():
        return probe, probe
    return probe.take((~mask).nonzero()[:, 0]), probe.take(mask.nonzero()[:, 0])
